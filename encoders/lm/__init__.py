"""The domain language model: corpus, tokenizer, pretraining, tuning, evaluation."""
