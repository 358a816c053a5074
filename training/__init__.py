"""Click models on feature vectors: data set, models, training, evaluation, export."""
