"""The compat modules of the spectral family against the official definitions, restated."""

import itertools

import pytest
import torch
from torch import nn

from fastcifar.compat import afno, gfnet, spectformer
from fastcifar.compat import spectformer_hierarchical as hierarchical


def _linear(name, bias=True):
    return [f"{name}.weight"] + [f"{name}.bias"] * bias


def _mlp(name):
    return _linear(f"{name}.fc1") + _linear(f"{name}.fc2")


def _spectral_block(name, gamma=False):
    keys = [f"{name}.filter.complex_weight", *_linear(f"{name}.norm1"), *_linear(f"{name}.norm2")]
    return [f"{name}.gamma"] * gamma + keys + _mlp(f"{name}.mlp")


def _attention_block(name):
    keys = _linear(f"{name}.norm1") + _linear(f"{name}.norm2") + _mlp(f"{name}.mlp")
    return keys + _linear(f"{name}.attn.qkv") + _linear(f"{name}.attn.proj")


def _gfnet_keys(depth, alpha=99):
    blocks = [(_spectral_block if i < alpha else _attention_block)(f"blocks.{i}") for i in range(depth)]
    return ["pos_embed", *_linear("patch_embed.proj"), *itertools.chain(*blocks), *_linear("norm"), *_linear("head")]


def _pyramid_keys(depth, gamma):
    down = _linear("patch_embed.0.proj") + _linear("patch_embed.1.proj") + _linear("patch_embed.2.proj")
    down += _linear("patch_embed.3.proj")
    blocks = [_spectral_block(f"blocks.{s}.{i}", gamma) for s in range(4) for i in range(depth[s])]
    return ["pos_embed", *down, *itertools.chain(*blocks), *_linear("norm"), *_linear("head")]


def _hierarchical_keys(depths, token_label=True):
    keys = []
    for s in range(1, 5):
        if s == 1:
            for i in (0, 3, 6):
                norm = f"patch_embed1.conv.{i + 1}"
                keys += [f"patch_embed1.conv.{i}.weight", *_linear(norm)]
                keys += [f"{norm}.running_mean", f"{norm}.running_var", f"{norm}.num_batches_tracked"]
        keys += _linear(f"patch_embed{s}.proj") + _linear(f"patch_embed{s}.norm")
        for i in range(depths[s - 1]):
            block = f"block{s}.{i}"
            keys += _linear(f"{block}.norm1") + _linear(f"{block}.norm2") + _mlp(f"{block}.mlp")
            keys += _linear(f"{block}.mlp.dwconv.dwconv")
            if s < 3:
                keys += [f"{block}.attn.complex_weight"]
            else:
                keys += [key for name in ("q", "kv", "proj") for key in _linear(f"{block}.attn.{name}")]
        keys += _linear(f"norm{s}")
    post = "post_network.0"
    keys += _linear(f"{post}.norm1") + _linear(f"{post}.norm2") + _mlp(f"{post}.mlp")
    keys += [key for name in ("kv", "q", "proj") for key in _linear(f"{post}.attn.{name}")]
    return keys + _linear("head") + (_linear("aux_head") if token_label else [])


SMALL = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 12, "depth": 3}
PYRAMID = {"img_size": 32, "num_classes": 10, "embed_dim": [4, 8, 8, 12], "depth": [1, 2, 1, 1]}
HIERARCHICAL = {"embed_dims": [8, 16, 24, 32], "num_heads": [1, 1, 2, 2], "depths": [1, 2, 1, 1], "img_size": 32}


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda: gfnet.GFNet(**SMALL), _gfnet_keys(3)),
        (
            lambda: gfnet.GFNet(**SMALL, representation_size=6),
            [*_gfnet_keys(3), *_linear("pre_logits.fc")],
        ),
        (lambda: gfnet.GFNetPyramid(**PYRAMID), _pyramid_keys(PYRAMID["depth"], True)),
        (lambda: gfnet.GFNetPyramid(**PYRAMID, no_layerscale=True), _pyramid_keys(PYRAMID["depth"], False)),
        (lambda: spectformer.SpectFormer(**SMALL | {"depth": 6}), _gfnet_keys(6, 4)),
        (lambda: hierarchical.SpectFormer(**HIERARCHICAL), _hierarchical_keys(HIERARCHICAL["depths"])),
        (
            lambda: hierarchical.SpectFormer(**HIERARCHICAL, token_label=False, unknown=1),
            _hierarchical_keys(HIERARCHICAL["depths"], False),
        ),
    ],
)
def test_state_dict_keys_and_strict_loading(make, keys):
    model = make()
    assert sorted(model.state_dict()) == sorted(keys)
    checkpoint = {key: torch.randn(value.shape).to(value.dtype) for key, value in model.state_dict().items()}
    model.load_state_dict(checkpoint, strict=True)
    assert all(torch.equal(value, checkpoint[key]) for key, value in model.state_dict().items())


def _filter(x, weight):
    """The official formula: orthonormal transforms in float32, complex gate, float32 out."""
    batch, tokens, channels = x.shape
    side = int(tokens**0.5)
    gate = torch.complex(weight[..., 0], weight[..., 1])
    z = torch.fft.rfftn(x.reshape(batch, side, side, channels).float(), dim=(1, 2), norm="ortho")
    return torch.fft.irfftn(z * gate, s=(side, side), dim=(1, 2), norm="ortho").reshape(batch, tokens, channels)


def _norm(x, state, name, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def _dense(x, state, name):
    return x @ state[f"{name}.weight"].mT + state[f"{name}.bias"]


def _perceptron(x, state, name):
    return _dense(nn.functional.gelu(_dense(x, state, f"{name}.fc1")), state, f"{name}.fc2")


def _patches(x, state, name, size):
    """A convolution whose stride is its kernel, as a product with patches."""
    weight = state[f"{name}.proj.weight"]
    patches = x.unfold(2, size, size).unfold(3, size, size)  # [B, C, h, w, size, size]
    return torch.einsum("bchwij,dcij->bhwd", patches, weight).flatten(1, 2) + state[f"{name}.proj.bias"]


def _spectral(x, state, name, gamma=False):
    mixed = _filter(_norm(x, state, f"{name}.norm1"), state[f"{name}.filter.complex_weight"])
    branch = _perceptron(_norm(mixed, state, f"{name}.norm2"), state, f"{name}.mlp")
    return x + (state[f"{name}.gamma"] * branch if gamma else branch)


def _attention(x, state, name, heads=6):
    y = _norm(x, state, f"{name}.norm1")
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in _dense(y, state, f"{name}.attn.qkv").chunk(3, -1))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    y = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)
    x = x + _dense(y, state, f"{name}.attn.proj")
    return x + _perceptron(_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp")


def _head(x, state):
    return _dense(_norm(x, state, "norm").mean(1), state, "head")


def _vanilla(x, state, depth, alpha=99):
    x = _patches(x, state, "patch_embed", 4) + state["pos_embed"]
    for i in range(depth):
        x = (_spectral if i < alpha else _attention)(x, state, f"blocks.{i}")
    return _head(x, state)


def _pyramid(x, state, depth):
    for s in range(4):
        if s:
            side = int(x.shape[1] ** 0.5)
            x = x.mT.unflatten(2, (side, side))
        x = _patches(x, state, f"patch_embed.{s}", 2 if s else 4)
        x = x if s else x + state["pos_embed"]
        for i in range(depth[s]):
            x = _spectral(x, state, f"blocks.{s}.{i}", gamma=True)
    return _head(x, state)


@pytest.mark.parametrize(
    ("model", "official"),
    [
        (gfnet.GFNet(**SMALL), lambda x, state: _vanilla(x, state, 3)),
        (spectformer.SpectFormer(**SMALL | {"depth": 6}), lambda x, state: _vanilla(x, state, 6, 4)),
        (gfnet.GFNetPyramid(**PYRAMID, init_values=0.3), lambda x, state: _pyramid(x, state, PYRAMID["depth"])),
    ],
)
def test_models_compute_the_official_formulas(model, official):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    state = dict(model.named_parameters())
    x = torch.randn(2, 3, 32, 32)
    leaves = list(model.parameters())
    results = []
    for y in (model(x), official(x, state)):
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 2e-4 * max(1, theirs.abs().max())


def test_dtype_rules():
    filters = [
        gfnet.GlobalFilter(4, 4, 3),
        afno.GlobalFilter(4, 4, 3),
        spectformer.SpectralGatingNetwork(4, 4, 3),
        gfnet.GFNet(img_size=16, patch_size=4, embed_dim=4, depth=1).blocks[0].filter,
    ]
    x = torch.randn(2, 16, 4)
    for module in filters:
        weight = module.complex_weight
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            y = module(x.to(dtype))
            assert y.dtype == torch.float32
            assert torch.allclose(y, _filter(x.to(dtype), weight), atol=1e-6)
        # made float64, the official module rounds its input to float32 and returns float64
        y = module.double()(x.double() + 1e-9)
        assert y.dtype == torch.float64
        exact = _filter(x.float(), module.complex_weight)
        assert torch.allclose(y, exact, atol=1e-6)
        assert module.half()(x).dtype == torch.float32
    for mixer in (afno.AFNO2D(16), afno.AFNO1D(16), afno.BFNO2D(16)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert mixer(torch.randn(2, 16, 16, dtype=dtype)).dtype == dtype


def test_positional_arguments_and_defaults():
    assert gfnet.GlobalFilter(2).complex_weight.shape == (14, 8, 2, 2)
    assert (gfnet.GlobalFilter(2).h, gfnet.GlobalFilter(2).w) == (14, 8)
    model = gfnet.GFNet(32, 4, 1, 5, 8, 2, 2.0, None, True, 0.1, 0.2, None, 0.3)
    assert model.blocks[0].mlp.fc1.out_features == 16
    assert model.blocks[0].drop_path.drop_prob == 0.2
    assert model.final_dropout.p == 0.3
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert afno.AFNO2D(16, 4, 0.1, 0.5, 2).w1.shape == (2, 4, 4, 8)
    assert spectformer.SpectFormer(32, 4, 3, 10, 128, 5).blocks[4].attn.num_heads == 2  # 6 does not divide 128


def test_building_blocks():
    x = torch.randn(2, 64, 12)
    for block in (
        gfnet.Block(12, h=8, w=5, act_layer=nn.ReLU),
        gfnet.BlockLayerScale(12, h=8, w=5, init_values=0.5),
        spectformer.Block(12, 2.0, h=8, w=5),
        spectformer.Block_attention(12, drop_path=0.1, h=8, w=5),
        spectformer.Attention(12, 4, qkv_bias=False, qk_scale=False),
        gfnet.Mlp(12, 24, 12),
    ):
        assert block(x).shape == x.shape
    assert gfnet.Mlp(12, out_features=5)(x).shape == (2, 64, 5)
    assert gfnet.DownLayer(8, 12, 16)(x).shape == (2, 16, 16)
    assert gfnet.PatchEmbed(32, 4, 3, 7)(torch.randn(1, 3, 32, 32)).shape == (1, 64, 7)
    assert spectformer.Attention(12, 4).qkv.bias is None
    with pytest.raises(ValueError, match="DownLayer: expected 64 tokens"):
        gfnet.DownLayer(8, 12, 16)(x[:, :3])


def test_the_hierarchical_gate_and_constructors():
    for dim, side in ((64, 56), (96, 56), (128, 28), (192, 28)):
        module = hierarchical.SpectralGatingNetwork(dim)
        assert module.complex_weight.shape == (side, side // 2 + 1, dim, 2)
    x = torch.randn(1, 784, 192)
    assert torch.allclose(module(x, 28, 28), _filter(x, module.complex_weight), atol=1e-5)
    assert hierarchical.SpectralGatingNetwork(7, 4, 3)(torch.randn(1, 16, 7), 4, 4).shape == (1, 16, 7)
    with pytest.raises(ValueError, match="SpectralGatingNetwork: expected h and w"):
        hierarchical.SpectralGatingNetwork(7)
    for make, count in (
        (hierarchical.spectformer_s, 22_226_928),
        (hierarchical.spectformer_b, 33_052_880),
        (hierarchical.spectformer_l, 54_675_792),
    ):
        with torch.device("meta"):
            model = make(pretrained=False)
        assert sum(p.numel() for p in model.parameters()) == count
        assert model.norm1.eps == 1e-6
        assert model.patch_embed1.norm.eps == 1e-5
        assert model.block1[0].attn.out_dtype == "float32"
