"""Text to vectors: behaviour texts through the shallow half of a language model, once each."""
