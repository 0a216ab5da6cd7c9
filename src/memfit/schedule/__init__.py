"""The workspace line of the ledger: temporaries, and the holes that freed ones leave."""
