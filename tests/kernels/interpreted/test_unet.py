"""A whole diffusers UNet with a fixed context and fused parts, against itself without."""

import pytest
import torch

from tests.kernels.interpreted.checks import UNIT
from vlv.diffusion.unet import FixedContext, fixed_context


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=4, block_out_channels=(32, 32), layers_per_block=1, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def test_fixed_context_is_the_same_unet(unet):
    latents, context = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 16)
    with torch.inference_mode():
        exact = unet(latents, 3, encoder_hidden_states=context).sample
        before = [(name, type(module)) for name, module in unet.named_modules()]
        with fixed_context(unet, context):
            assert any(isinstance(p, FixedContext) for p in unet.attn_processors.values())
            found = unet(latents, 3, encoder_hidden_states=context).sample
            with pytest.raises(ValueError, match="fixed to a context"):
                unet(latents, 3, encoder_hidden_states=context[:, :4])
        assert [(name, type(module)) for name, module in unet.named_modules()] == before
        assert torch.equal(unet(latents, 3, encoder_hidden_states=context).sample, exact)
    # some forty layers, each a few roundings of values up to about ten
    assert (found - exact).abs().max() <= 40 * 10 * UNIT[torch.float32] * max(1, exact.abs().max().item())
