"""The benchmark of the bottleneck: what is frozen stays, what is new is new, and the short cut gives the same."""

import pytest
import torch

from benchmarks import bottleneck
from vlv.checkpoints.folder import Checkpoint
from vlv.data import scene_batches as data
from vlv.diffusion.t2i import T2I


@pytest.fixture(scope="module")
def trained(captioning_checkpoint):
    checkpoint = Checkpoint.open(captioning_checkpoint)
    if "reconstruct" not in checkpoint.can:
        pytest.skip("no checkpoint with a text-to-image model")
    return checkpoint.load_encoder(), T2I.load(checkpoint.t2i)


@pytest.mark.parametrize("queries", [2, 77])
def test_a_fresh_bottleneck(trained, queries, tmp_path):
    encoder, t2i = trained
    fresh, _ = bottleneck.fresh(encoder, t2i, queries)
    learning = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert all(n.split(".")[1] in ("queries", "decoder", "projection") for n in learning) and learning
    for part in ("vision", "image", "bottleneck.encoder"):
        old, new = encoder.get_submodule(part).state_dict(), fresh.get_submodule(part).state_dict()
        assert all(torch.equal(old[k], new[k]) for k in old)
    first = [e.bottleneck.decoder.layers[0].fc1.weight for e in (encoder, fresh)]
    assert not torch.equal(*first)
    pixels = data.images(range(3))
    memory = bottleneck.memories(encoder, range(3), tmp_path / "memory.pt")
    with torch.inference_mode():
        short, whole = bottleneck.context(fresh, memory), fresh.context(pixels)
    assert short.shape == (3, queries, fresh.config.context_width)
    # the memory is kept as float16: 11 bits of mantissa
    assert (short - whole).abs().max() / whole.abs().max() < 4 * 2**-11
    assert torch.equal(bottleneck.memories(encoder, range(3), tmp_path / "memory.pt"), memory)


def test_positions_are_stretched_between_the_known_ends(trained):
    encoder, t2i = trained
    known = t2i.text_encoder.get_parameter("embeddings.position_embedding.weight")
    few, many = (bottleneck.fresh(encoder, t2i, n)[0].bottleneck.text.positions for n in (8, 77))
    assert torch.equal(few, known[:8]) and many.shape == (77, known.shape[1])
    assert torch.allclose(many[[0, -1]], known[[0, -1]], atol=1e-6)
    assert torch.allclose(t2i.text_encoder.get_parameter("embeddings.position_embedding.weight"), known)
