"""The networks of the laboratory: counts, shapes, width factor, seeds, names."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autowidth import lab
from autowidth.lab.models import (
    MODELS,
    PaddingShortcut,
    UnknownModelError,
    build,
    model,
    resolve,
    scaled,
    spec,
)

SMALL = ["resnet20", "resnet20-padding", "vgg8", "densenet40", "mobilenetv2"]


def macs(model: nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *shape))
    return int(counter.get_total_flops()) // 2


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def norm_outputs(model: nn.Module) -> int:
    """Elements that the norms put out for one image of 3 x 32 x 32."""
    counts: list[int] = []
    hooks = [
        m.register_forward_hook(lambda _m, _i, out: counts.append(out.numel()))
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    model.eval()(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def resnet_macs(depth: int, shortcut: str) -> int:
    """By hand: 6n+1 convolutions of 3x3, two projections of 1x1, one linear layer."""
    n = (depth - 2) // 6
    total = 9 * 3 * 16 * 32 * 32 + 64 * 10
    for stage, (channels, side) in enumerate([(16, 32), (32, 16), (64, 8)]):
        inputs = channels // 2 if stage else channels
        total += 9 * side * side * channels * (inputs + (2 * n - 1) * channels)
        if stage and shortcut == "projection":
            total += side * side * channels * inputs
    return total


@pytest.mark.parametrize("depth", [8, 20, 56])
@pytest.mark.parametrize("shortcut", ["projection", "padding"])
def test_resnet_macs_are_the_closed_form(depth: int, shortcut: str) -> None:
    name = f"resnet{depth}" + ("-padding" if shortcut == "padding" else "")
    assert macs(build(name)) == resnet_macs(depth, shortcut)


# Published: name -> (MACs in millions, parameters in millions, each with the digits that are printed).
PUBLISHED = {
    "resnet20": (None, 0.27),  # He et al. 2016, table 6
    "resnet32": (None, 0.46),
    "resnet56-padding": (125.49, 0.85),
    "resnet110-padding": (252.89, 1.73),  # pruning papers print 252.89 (HRank and others), parameters 1.72 to 1.73
    "vgg16": (313.2, 14.72),
    "densenet40": (282.92, None),
    "googlenet": (1520.0, 6.16),
    "mobilenetv2": (None, 2.24),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    published_macs, published_parameters = PUBLISHED[name]
    model = build(name)
    if published_macs is not None:
        assert macs(model) / 1e6 == pytest.approx(published_macs, rel=2e-3)
    if published_parameters is not None:
        assert parameters(model) / 1e6 == pytest.approx(published_parameters, abs=0.007)


def test_vgg16_differs_from_the_larger_published_one_by_what_its_docstring_says() -> None:
    model = build("vgg16")
    hidden = 512 * 512
    assert (macs(model) + hidden + norm_outputs(model)) / 1e6 == pytest.approx(313.73, abs=0.02)
    assert (parameters(model) + hidden) / 1e6 == pytest.approx(14.98, abs=0.01)


def test_densenet_has_its_published_parameters_in_its_weights() -> None:
    assert sum(p.numel() for p in build("densenet40").parameters() if p.ndim > 1) / 1e6 == pytest.approx(
        1.04, abs=0.005
    )


def test_mobilenet_is_the_published_one_but_for_strides() -> None:
    # Strides hold no parameters, so with 1000 classes the count must be that of the network for ImageNet, 3.50 M.
    assert parameters(build("mobilenetv2", num_classes=1000)) == 3_504_872


def test_vgg8_has_eight_convolutions_of_the_given_widths() -> None:
    convs = [m.out_channels for m in build("vgg8").modules() if isinstance(m, nn.Conv2d)]
    assert convs == [32, 32, 64, 64, 128, 128, 128, 128]


@pytest.mark.parametrize("name", MODELS)
def test_smallest_and_published_inputs_go_through_in_both_modes(name: str) -> None:
    side = spec(name).smallest
    model = build(name, num_classes=7, in_channels=1, width=0.25)
    assert model.train()(torch.randn(2, 1, side, side)).shape == (2, 7)
    assert model.eval()(torch.randn(1, 1, side, side)).shape == (1, 7)
    if "110" not in name:
        assert build(name, width=0.25).eval()(torch.randn(1, *spec(name).input_shape)).shape == (1, 10)


@pytest.mark.parametrize("name", ["resnet20", "resnet20-padding", "resnet14", "vgg8"])
def test_digits_fit(name: str) -> None:
    assert build(name, in_channels=1)(torch.randn(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize("name", [n for n in MODELS if "110" not in n])
def test_every_width_is_scaled(name: str) -> None:
    full, half = build(name), build(name, width=0.5)
    for (path, one), (_, other) in zip(full.named_modules(), half.named_modules(), strict=True):
        if isinstance(one, nn.Conv2d):
            assert isinstance(other, nn.Conv2d)
            assert other.out_channels * 2 == one.out_channels, path
            assert one.in_channels in (3, 2 * other.in_channels), path


@pytest.mark.parametrize("name", SMALL)
def test_topology_does_not_depend_on_the_width(name: str) -> None:
    paths = [path for path, _ in build(name).named_modules()]
    assert [path for path, _ in build(name, width=0.02).named_modules()] == paths
    assert [getattr(m, "adds_input", None) for m in build(name).modules()] == [
        getattr(m, "adds_input", None) for m in build(name, width=0.02).modules()
    ]


def test_width_is_rounded_and_never_zero() -> None:
    assert [scaled(16, w) for w in (1.0, 0.5, 2.0, 0.72, 0.001)] == [16, 8, 32, 12, 1]
    with pytest.raises(ValueError, match="must be positive, got -1"):
        scaled(16, -1.0)
    with pytest.raises(ValueError, match="must be positive, got nan"):
        scaled(16, float("nan"))


@pytest.mark.parametrize("name", SMALL)
def test_seed_reproduces(name: str) -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(build(name, width=0.5).state_dict())
    same = [torch.equal(states[0][key], states[1][key]) for key in states[0]]
    other = [torch.equal(states[0][key], states[2][key]) for key in states[0] if "conv.weight" in key]
    assert all(same)
    assert other
    assert not any(other)


@pytest.mark.parametrize("name", SMALL)
def test_convolutions_before_norms_have_no_bias_and_kaiming_variance(name: str) -> None:
    torch.manual_seed(0)
    for module in build(name).modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            if module.weight.numel() > 5000:
                expected = (2 / module.weight[0].numel()) ** 0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", SMALL)
def test_signal_neither_dies_nor_explodes_at_the_start(name: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    x = torch.randn(8, 3, 32, 32)
    model.train()(x).logsumexp(1).sum().backward()
    assert 0.05 < model(x).std().item() < 20
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_padding_shortcut_follows_the_live_tensors_and_pads_at_the_end() -> None:
    shortcut, x = PaddingShortcut(2), torch.randn(2, 3, 4, 4)
    for channels in (3, 5, 9):
        out = shortcut(x, torch.zeros(2, channels, 2, 2))
        assert out.shape == (2, channels, 2, 2)
        assert torch.equal(out[:, :3], x[:, :, ::2, ::2])
        assert not out[:, 3:].any()


def test_padding_resnet_equals_one_with_projections_that_copy_channels() -> None:
    torch.manual_seed(0)
    padded, projected = build("resnet8-padding"), build("resnet8")
    projected.load_state_dict(padded.state_dict(), strict=False)
    for stage in (1, 2):
        projection = projected.get_submodule(f"stages.{stage}.0.shortcut")
        conv, norm = projection.conv, projection.norm
        with torch.no_grad():
            conv.weight.zero_()
            for channel in range(conv.in_channels):
                conv.weight[channel, channel] = (1 + norm.eps) ** 0.5  # undoes the norm's epsilon
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(padded.eval()(x), projected.eval()(x))


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [8, 14, 26, 44])
def test_resnets_of_all_fitting_depths_are_known(depth: int) -> None:
    convs = [m for m in build(f"resnet{depth}-padding", width=0.1).modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == depth - 1  # and one linear layer


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("resnet55", "nearest is resnet56"),
        ("resnet2-padding", "nearest is resnet8-padding"),
        ("vg16", "close names: vgg16"),
        ("", "known names: resnet20"),
        ("no_such_module_at_all:Net", "no module is named 'no_such_module_at_all'"),
        ("torch.no_such_part:Net", "no module is named 'torch.no_such_part'"),
        ("torch.nn:Convv2d", "close names: Conv2d"),
        ("torch.nn:", "the form is module:callable"),
        (":Net", "the form is module:callable"),
        ("../net.py:Net", "the form is module:callable"),
    ],
)
def test_unknown_names_are_refused_with_a_hint(text: str, hint: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        resolve(text)
    assert hint in str(caught.value)
    assert isinstance(caught.value, ValueError)


OWN_NETS = """
from torch import nn

class Full(nn.Module):
    def __init__(self, num_classes, in_channels, width):
        super().__init__()
        self.linear = nn.Linear(in_channels, int(width * num_classes))

class Holder:
    @staticmethod
    def fixed(num_classes=10):
        return nn.Linear(4, num_classes)

def anything(**settings):
    net = nn.Identity()
    net.settings = settings
    return net

class Narrow(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.head = nn.Linear(2, num_classes)

def handing_on(**settings):
    return Narrow(**settings)

def failing(**settings):
    raise TypeError("something else is wrong")

def number():
    return 7

instance = nn.Identity()
"""


@pytest.fixture
def own_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets_for_test.py").write_text(OWN_NETS)
    (tmp_path / "broken_net_for_test.py").write_text("import no_such_dependency_for_test\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_nets_for_test", "broken_net_for_test"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("own_nets")
def test_a_callable_gets_the_keywords_that_it_takes() -> None:
    full = resolve("own_nets_for_test:Full", num_classes=6, in_channels=5, width=2.0)
    assert tuple(full.linear.weight.shape) == (12, 5)
    assert resolve("own_nets_for_test:Holder.fixed", num_classes=3).out_features == 3
    settings = resolve("own_nets_for_test:anything", num_classes=3, in_channels=1, width=0.5).settings
    assert settings == {"num_classes": 3, "in_channels": 1, "width": 0.5}


@pytest.mark.usefixtures("own_nets")
def test_keywords_that_are_refused_further_down_are_left_out() -> None:
    """As with torchvision's builders, which take any keyword and hand it on to a class that does not."""
    assert resolve("own_nets_for_test:handing_on", num_classes=7).head.out_features == 7
    assert resolve("own_nets_for_test:handing_on").head.out_features == 4
    assert tuple(resolve("own_nets_for_test:Full", in_channels=5).linear.weight.shape) == (10, 5)
    with pytest.raises(TypeError, match="unexpected keyword"):
        resolve("own_nets_for_test:handing_on", width=0.5)
    with pytest.raises(TypeError, match="something else"):
        resolve("own_nets_for_test:failing")


@pytest.mark.usefixtures("own_nets")
def test_a_callable_that_does_not_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="takes no keyword 'width'"):
        resolve("own_nets_for_test:Holder.fixed", width=0.5)
    with pytest.raises(TypeError, match="returned an int, expected"):
        resolve("own_nets_for_test:number")
    with pytest.raises(TypeError, match="is an Identity, expected a class or function"):
        resolve("own_nets_for_test:instance")
    with pytest.raises(TypeError, match="no readable signature"):
        resolve("builtins:dict")


@pytest.mark.usefixtures("own_nets")
def test_a_failing_import_inside_the_users_module_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency_for_test"):
        resolve("broken_net_for_test:Net")


def test_a_built_in_name_resolves() -> None:
    assert parameters(resolve("resnet8", num_classes=3, width=0.5)) == parameters(
        build("resnet8", num_classes=3, width=0.5)
    )


# --- the current folder ---------------------------------------------------------------------------------------------

USER_FILES = {
    "my_net.py": """
        import colorsys, json, random  # of the standard library, whatever lies beside this file
        from torch import nn
        from shapes.widths import WIDTH

        assert not any(hasattr(module, "mine") for module in (colorsys, json, random))

        def net(num_classes=10):
            from asked_for_later import DEPTH
            return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)], nn.Linear(WIDTH, num_classes))
    """,
    "shapes/__init__.py": "",
    "shapes/widths.py": "from .numbers import FIVE as WIDTH",
    "shapes/numbers.py": "FIVE = 5",
    "asked_for_later.py": "DEPTH = 2",
    "never_asked_for.py": "",
    "failing_net.py": "raise RuntimeError('this module fails')",
    "calendar.py": "def Net(): pass",
    **{f"{name}.py": "mine = True" for name in ("random", "json", "colorsys", "wave")},
}

CALLER = """
    import os, sys
    from autowidth.lab.models import UnknownModelError, resolve

    assert os.getcwd() not in sys.path and not {"colorsys", "wave"} & set(sys.modules)
    before = list(sys.path)
    model = resolve("my_net:net", num_classes=3)
    assert sys.path == before, sys.path
    assert [layer.out_features for layer in model] == [5, 5, 3]

    for text, message in [
        ("failing_net:net", "this module fails"),
        ("my_net:nett", "close names: net"),
        ("gone:net", "no module is named 'gone' in the current folder"),
        ("calendar:Net", "calendar is a module of the standard library: give your own another name"),
    ]:
        try:
            resolve(text)
        except (RuntimeError, UnknownModelError) as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"{text} led somewhere")
        assert sys.path == before, (text, sys.path)

    import wave
    assert not hasattr(wave, "mine")
    try:
        import never_asked_for
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("the folder is still found")

    sys.path.insert(0, os.getcwd())  # by whoever started Python: not ours to take away
    resolve("my_net:net")
    assert sys.path == [os.getcwd(), *before]
    print("done")
"""


def test_the_current_folder_is_on_the_path_only_while_a_model_of_it_is_made(tmp_path: Path) -> None:
    """In a process of its own, started as the installed command is: from a folder that is not the current one."""
    for name, text in USER_FILES.items():
        path = tmp_path / "user" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (tmp_path / "caller.py").write_text(textwrap.dedent(CALLER))
    source = str(Path(lab.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "caller.py")],
        cwd=tmp_path / "user",
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr


# --- the registry ---------------------------------------------------------------------------------------------------


def test_the_networks_are_listed_in_their_order() -> None:
    families = [name.rstrip("0123456789") for name in MODELS if not name.endswith("-padding")]
    assert list(dict.fromkeys(families)) == ["resnet", "vgg", "densenet", "googlenet", "mobilenetv"]
    assert list(MODELS)[:5] == ["resnet20", "resnet32", "resnet56", "resnet110", "resnet20-padding"]


def test_a_decorated_builder_is_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_conv(*, num_classes: int, in_channels: int, width: float) -> nn.Module:
        return nn.Sequential(nn.Conv2d(in_channels, scaled(num_classes, width), 1))

    monkeypatch.setitem(MODELS, "one-conv", None)  # so that it is taken out again
    del MODELS["one-conv"]
    assert model("one-conv", smallest=1, input_shape=(1, 4, 4))(one_conv) is one_conv
    assert (spec("one-conv").smallest, spec("one-conv").input_shape) == (1, (1, 4, 4))
    assert build("one-conv", num_classes=4, in_channels=2, width=0.5)[0].weight.shape == (2, 2, 1, 1)
    assert resolve("one-conv", num_classes=3)[0].out_channels == 3
    with pytest.raises(ValueError, match="two networks are named 'one-conv'"):
        model("one-conv", smallest=1)
