"""How recipes take methods: which mixins and options there are is read before everything else."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

from conftest import load_script
from veripo_trl.answers.rewards import REWARDS
from veripo_trl.errors import ConfigError
from veripo_trl.loop.check import check_settings
from veripo_trl.loop.plan import LoopError
from veripo_trl.methods import METHODS, Method, load_methods, with_methods
from veripo_trl.options import option
from veripo_trl.recipe.arguments import parse
from veripo_trl.trainers.grpo import VideoGRPOConfig

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ARGV = ["--model_name_or_path", "none", "--output_dir", "outputs/none", "--bf16", "false", "--use_cpu", "true"]


@dataclass
class OwnOptions:
    own_size: float = option("A size.", 0.5)


class Own(Method):
    NAME = "own"
    OPTIONS = OwnOptions

    def __init__(self, *args, own: OwnOptions, **kwargs):
        super().__init__(*args, **kwargs)
        self.said = [*self.said, own.own_size]


class Later(Method):
    NAME = "later"
    OPTIONS = dataclass(type("LaterOptions", (), {}))
    EXCLUDES = {"other": "both weigh tokens."}

    def __init__(self, *args, later, **kwargs):
        super().__init__(*args, **kwargs)
        self.said = [*self.said, "later"]


class Other(Later):
    NAME = "other"
    EXCLUDES = {}


class Trainer:
    def __init__(self, start):
        self.said = [start]


@pytest.fixture
def grpo():
    return load_script("recipes/grpo_video.py")


def parsed(recipe, *argv) -> tuple:
    return parse(recipe.ARGUMENTS, default_config=recipe.DEFAULT_CONFIG, argv=[*ARGV, *argv])


def test_options_of_a_named_method_are_the_recipes(grpo, tmp_path, capsys):
    assert len(parsed(grpo)) == len(grpo.ARGUMENTS)
    assert parsed(grpo, "--methods", "test_methods:Own", "--own_size", "2")[-1] == OwnOptions(2.0)
    file = tmp_path / "own.yaml"
    file.write_text("methods: [test_methods:Own, test_methods:Later]\nown_size: 3\n")
    *_, own, later = parsed(grpo, "--config", str(file))
    assert (own, type(later)) == (OwnOptions(3.0), Later.OPTIONS)
    file.write_text("methods: test_methods:Own\n")
    with pytest.raises(ConfigError, match=r"methods: expected a list, like \[test_methods:Own\]"):
        parsed(grpo, "--config", str(file))
    with pytest.raises(ConfigError, match="unknown key 'own_size'"):
        parsed(grpo, "--own_size", "2")
    file.write_text("methods: [care]\ncare_bonus: 0\n")
    with pytest.raises(ConfigError, match="'care_bonus' .of the method care, which methods does not name"):
        parsed(grpo, "--config", str(file), "--methods", "test_methods:Own")
    with pytest.raises(SystemExit):
        grpo.main(["--methods", "test_methods:Own", "--help"])
    assert "--own_size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("t_grpo", "length_range: 320", r"length_range: expected list\[int\], came 320"),
        ("t_grpo", "length_range: [320, null]", r"expected list\[int\], came \[320, None\]"),
        ("t_grpo", "temporal_rollouts: true", r"expected int \| None, came True. Leave it out for its default, None"),
        ("tw_grpo", "token_weight_block: 2.5", "expected int, came 2.5"),
        ("reg_grpo", "regression_floor: [0.1]", "expected float, came .0.1."),
        ("grounding_curriculum", "difficulty_files: a.json", "expected list.str. | None, came 'a.json'"),
        ("tw_grpo", "{token_weight_block: '8', token_weight_max: 2, token_weight_top_k: null}", None),
    ],
)
def test_a_value_of_another_type_is_refused(method, setting, message, grpo, tmp_path):
    """Of a YAML: argparse looks at the command line's, and at texts."""
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"methods": [method], **yaml.safe_load(setting)}))
    if message is None:
        assert parsed(grpo, "--config", str(file))[-1].token_weight_block == 8
    else:
        with pytest.raises(ConfigError, match=message):
            parsed(grpo, "--config", str(file))


def test_mixins_come_before_the_trainer_in_order():
    make = with_methods(Trainer, ["test_methods:Own", "test_methods:Later"], [OwnOptions(), Later.OPTIONS()])
    made = make("start")
    assert made.said == ["start", "later", 0.5]  # the first is the outermost
    assert isinstance(made, Trainer) and type(made).__name__ == "Trainer"
    assert type(with_methods(Trainer, None, [])("start")).__mro__[1] is Trainer


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["unknown"], "expected some of .*, or module:Mixin; got 'unknown'"),
        (["test_methods:Trainer"], "expected a subclass of veripo_trl.methods.Method"),
        (["test_methods:Other", "test_methods:Later"], "later and other cannot go together: both weigh tokens"),
        (["test_methods:Later", "test_methods:Other"], "other and later cannot go together: both weigh tokens"),
        (["test_methods:Own", "test_methods:Own"], "own twice, or options of one name: .'own_size'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(names, message):
    with pytest.raises(ConfigError, match=message):
        load_methods(names)


def test_every_shipped_method_keeps_the_contract(grpo):
    taken = {item.name for kind in grpo.ARGUMENTS for item in fields(kind)}
    for name in METHODS:
        (mixin,) = load_methods([name])
        assert mixin.NAME == name and mixin.__doc__
        own = {item.name for item in fields(mixin.OPTIONS)}
        assert not own & taken and all(item.metadata["help"] for item in fields(mixin.OPTIONS))
        taken |= own


def test_a_loop_knows_the_options_of_a_stages_methods():
    stage = {"name": "search-1", "recipe": "grpo_video.py", "judge_command": None}
    stage["script"] = str(RECIPES / "grpo_video.py")
    check_settings([stage | {"settings": {"methods": ["test_methods:Own"], "own_size": 1}}])
    with pytest.raises(LoopError, match="knows no own_size"):
        check_settings([stage | {"settings": {"own_size": 1}}])


class Accepted(Exception):
    pass


class Accepting:
    """A trainer that is reached only by what its method did not refuse."""

    def __init__(self, *args, **kwargs):
        raise Accepted


def is_refused(method: str, given: dict) -> bool:
    """Whether a method refuses settings, other methods among them."""
    settings = {
        "num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2,
        "loss_type": "grpo", "output_dir": "outputs/none", "bf16": False, "use_cpu": True, **given,
    }  # fmt: skip
    try:
        (*_, mixin) = load_methods([*settings.pop("methods", []), method])
        trainer = type("Trainer", (mixin, Accepting), {})
        given = {"args": VideoGRPOConfig(**settings), "reward_funcs": [REWARDS["accuracy"]], "train_dataset": None}
        trainer(**given, **{method: mixin.OPTIONS()})
    except ConfigError:
        return True
    except Accepted:
        return False


def test_the_page_says_what_is_refused():
    """Every cell of its table whose setting is written as YAML; methods without a column refuse nothing of it."""
    page = (RECIPES.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")
    ]
    columns = re.findall(r"`(\w+)`", " ".join(head))
    others = [name for name in METHODS if name not in columns and not is_refused(name, {})]
    checked = 0
    for setting, *cells in rows:
        if not (given := re.match(r"`(\{.*\}|\w+: .*?)`", setting)):
            continue
        said = {**dict(zip(columns, cells, strict=True)), **dict.fromkeys(others, "yes")}
        for method, cell in said.items():
            if cell != "–":
                refused = is_refused(method, yaml.safe_load(given[1]))
                assert cell.partition(":")[0] == ("no" if refused else "yes"), (setting, method)
                checked += 1
    assert checked >= 50
