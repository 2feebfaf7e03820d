"""The steps of the plan, a folder each."""
