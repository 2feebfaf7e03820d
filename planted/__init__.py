"""Models whose circuit is set by hand and known: `python -m planted "planted:seed=3" --to FOLDER`."""
