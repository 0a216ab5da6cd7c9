"""The vision task: convolutional nets that are fine-tuned on a person's own images."""
