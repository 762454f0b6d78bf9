"""The paper's model: vision tower, bottleneck, encoder, captioner."""
