"""Feature nets from folders and files, without torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlv.data import scene_batches as data
from vlv.evaluate import scene_net as scene_net_command
from vlv.evaluate.metrics.features import FeatureNet
from vlv.evaluate.results import EvaluationError
from vlv.evaluate.synthetic.scene_net import presence


@pytest.fixture(scope="module")
def images():
    return data.images(range(6))


def save_clip(folder):
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    vision = small | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    preparation = '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32}'
    (folder / "preprocessor_config.json").write_text(preparation)


def test_a_net_trained_here(scene_net, images):
    """What the folder gives is what the classifier's own body gives on the pixels that it was trained on."""
    from transformers import ResNetForImageClassification

    features = FeatureNet(scene_net)(images, batch=4)
    assert features.shape == (6, 128) and features.dtype == torch.float32
    net = ResNetForImageClassification.from_pretrained(scene_net)
    with torch.inference_mode():
        expected = net.resnet(images / 127.5 - 1).pooler_output.flatten(1)
    assert (features - expected).abs().max() / expected.abs().max() < 1e-5


def test_a_file_that_is_no_net(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"\x89PNG no net" * 9)
    with pytest.raises(EvaluationError, match=r"net\.pt is no TorchScript file: expected inception"):
        FeatureNet(tmp_path / "net.pt")


def test_a_net_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert scene_net_command.main([str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit) as stopped:
        scene_net_command.main([str(tmp_path), "--steps", "0"])
    assert stopped.value.code == 2 and "expected a positive integer, got '0'" in capsys.readouterr().err


def test_training_teaches_it_the_scenes(scene_net):
    """A few steps lower its loss on scenes that it has not seen: it is trained, not random."""
    from transformers import ResNetConfig, ResNetForImageClassification

    from vlv.data import scenes

    seeds = range(scenes.HELD_OUT, scenes.HELD_OUT + 64)
    truth = presence([scenes.sample(s) for s in seeds])
    config = ResNetConfig.from_pretrained(scene_net)

    def loss(net):
        with torch.inference_mode():
            logits = net.eval()(data.images(seeds) / 127.5 - 1).logits
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, truth).item()

    torch.manual_seed(1)
    assert loss(ResNetForImageClassification.from_pretrained(scene_net)) < 0.7 * loss(
        ResNetForImageClassification(config)
    )


def test_clip_gives_its_projected_image_embedding(tmp_path, images):
    from transformers import CLIPModel

    save_clip(tmp_path)
    features = FeatureNet(tmp_path)(images)
    assert features.shape == (6, 12)
    net = CLIPModel.from_pretrained(tmp_path)
    resized = np.stack([np.asarray(_small(p)) for p in images.permute(0, 2, 3, 1).numpy()])
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor((resized / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = net.visual_projection(net.vision_model(pixels).pooler_output)
    assert (features - expected).abs().max() / expected.abs().max() < 1e-4


def _small(image):
    return Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)


def test_the_torchscript_inception(tmp_path, images):
    """The published FID network is a script with `layers`, which takes images of 299 pixels from -1 to 1."""

    class Layers(torch.nn.Module):
        def forward(self, x):
            return torch.cat([x.mean((2, 3)), x.amax((2, 3)), torch.full((len(x), 1), float(x.shape[-1]))], dim=1)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = Layers()

        def forward(self, x):
            return self.layers(x)

    torch.jit.script(Net()).save(tmp_path / "inception.pt")
    features = FeatureNet(tmp_path / "inception.pt")(images)
    assert (features[:, -1] == 299).all()
    # the mean of an enlarged image is its own, but for the weight of the border
    assert (features[:, :3] - (images.float().mean((2, 3)) - 128) / 128).abs().max() < 0.02
    torch.jit.script(Layers()).save(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="has no `layers`"):
        FeatureNet(tmp_path / "other.pt")


def test_what_is_no_feature_net(tmp_path, scene_net, images):
    with pytest.raises(EvaluationError, match="neither a transformers folder"):
        FeatureNet(tmp_path)
    save_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="no usable preprocessor_config"):
        FeatureNet(tmp_path)
    broken = FeatureNet(scene_net)
    next(broken.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        broken(images)
