"""The gradients line of the ledger: techniques that keep weight gradients small."""
