"""Techniques that shrink what forward keeps for backward."""
