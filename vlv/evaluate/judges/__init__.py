"""Questions to a language model about captions: grades, pairs, answers of VQA, boxes."""
