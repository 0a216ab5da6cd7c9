"""The weights line of the ledger: how a parameter is held, and what it costs to write it."""
