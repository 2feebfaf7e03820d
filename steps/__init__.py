"""The steps of the plan, a folder each."""

import warnings

# Progress is plain text here: widgets in a saved notebook load scripts from the network.
warnings.filterwarnings("ignore", message="IProgress not found")
