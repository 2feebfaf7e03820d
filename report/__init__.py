"""What the pages are made of: tables, figures and sentences from a step's results. No model is loaded here."""
