"""Speech recognition as a task: recordings in, a small LSTM-CTC recognizer, text out.

Reading order: ``audio`` and ``data`` (recordings and transcripts), ``text`` (characters as labels), ``features``
(log-mel), ``model`` (the recognizer and its file), ``batches`` (what a training step sees), ``decode`` and ``metrics``.
"""
