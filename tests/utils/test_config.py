"""Flags over YAML over defaults; types, checks and error texts."""

from dataclasses import dataclass

import pytest
import yaml

from utils.config import (
    differences,
    dump,
    flat,
    idle_options,
    option,
    options_of,
    parse,
    parse_bool,
    peek,
    section,
    with_default,
)
from utils.errors import UserError


@dataclass(frozen=True)
class MatchConfig:
    syn_steps: int = option(8, "inner steps", low=1, aliases=("steps",))
    lr_img: float = option(1000.0, "outer rate of pixels", above=0)
    mode: str = option("exact", "gradient", choices=("exact", "unroll", "detached"))
    window: int | None = option(None, "steps to differentiate", low=1)

    def check(self) -> None:
        if self.window is not None and self.window > self.syn_steps:
            raise UserError(f"--window {self.window} exceeds --syn_steps {self.syn_steps}")

    def idle(self) -> dict[str, str]:
        return {} if self.mode == "exact" else {"window": "--mode exact"}


@dataclass(frozen=True)
class Distill:
    """Learn a small set."""

    method: str = option("vldd", "method")
    match: MatchConfig = section(MatchConfig)
    draw: bool = option(False, "save pictures; 100 % optional")
    iterations: int = option(2000, "outer steps", free=True, aliases=("Iteration",))
    ks: tuple[int, ...] = option((1, 5, 10), "recall at these", low=1)
    encoders: tuple[str, ...] = option(("nfnet", "bert"), "encoders", choices=("nfnet", "bert", "clip"))
    note: str = option("", "free text")


@dataclass(frozen=True)
class Eval:
    num_eval: int = option(5, "networks", aliases=("nets",))


def read(*argv, **options):
    return parse(Distill, "distill", argv, peers=(Eval,), **options)[0]


@pytest.fixture
def config(tmp_path):
    def write(text):
        (tmp_path / "row.yaml").write_text(text, encoding="utf-8")
        return ("--config", str(tmp_path / "row.yaml"))

    return write


def fails(match, *argv, **options):
    with pytest.raises(UserError, match=match):
        read(*argv, **options)


def test_defaults():
    cfg, given = parse(Distill, "distill", [])
    assert cfg == Distill() and given == set()
    assert cfg.match.syn_steps == 8 and cfg.ks == (1, 5, 10)


def test_flags_over_yaml_over_base_over_defaults(config):
    file = config("common: {syn_steps: 2, iterations: 2, note: common}\ndistill: {iterations: 3, lr_img: 3}\n")
    base = {"syn_steps": 1, "iterations": 1, "lr_img": 1, "mode": "unroll", "unheard_of": 1}
    cfg, given = parse(Distill, "distill", [*file, "--lr_img", "4"], base=base)
    assert (cfg.match.mode, cfg.match.syn_steps, cfg.iterations, cfg.match.lr_img) == ("unroll", 2, 3, 4.0)
    assert cfg.note == "common" and cfg.draw is False
    assert given == {"syn_steps", "iterations", "lr_img", "note"}


@pytest.mark.parametrize(
    "argv, value",
    [
        (["--draw"], True),
        (["--draw", "True"], True),
        (["--draw=false"], False),
        (["--draw", "0"], False),
        (["--draw", "--note", "x"], True),
        (["--draw", "--draw", "no"], False),
    ],
)
def test_booleans(argv, value):
    assert read(*argv).draw is value


def test_parse_bool():
    assert [parse_bool(text) for text in (True, "YES", "on", 1, False, "Off", "no", 0)] == [True] * 4 + [False] * 4
    with pytest.raises(ValueError):
        parse_bool("maybe")


def test_yaml_reads_1e_2_as_text_and_we_as_a_number(config):
    assert yaml.safe_load("1e-2") == "1e-2"
    for text in ("1e-2", "'1e-2'", "0.01"):
        value = read(*config(f"distill: {{lr_img: {text}}}")).match.lr_img
        assert value == 0.01 and isinstance(value, float)
    value = read(*config("distill: {lr_img: 5, iterations: 1e3}"))
    assert isinstance(value.match.lr_img, float) and value.iterations == 1000 and isinstance(value.iterations, int)


@pytest.mark.parametrize("argv", [["--ks", "1", "2"], ["--ks", "1,2"], ["--ks", "1,", "2"], ["--ks=1, 2"]])
def test_lists_as_flags(argv):
    assert read(*argv).ks == (1, 2)


@pytest.mark.parametrize("text", ["[1, 2]", "'1, 2'", "[1, '2']"])
def test_lists_in_yaml(config, text):
    assert read(*config(f"distill: {{ks: {text}}}")).ks == (1, 2)
    assert read(*config("distill: {ks: 7}")).ks == (7,)


def test_aliases(config):
    assert read("--Iteration", "5", "--steps", "4") == read("--iterations", "5", "--syn_steps", "4")
    cfg, given = parse(Distill, "distill", config("distill: {Iteration: 5}"))
    assert cfg.iterations == 5 and given == {"iterations"}


def test_an_alias_of_one_letter_has_one_dash():
    @dataclass(frozen=True)
    class Judge:
        net_type: str = option("convnet", "network", aliases=("n",))

    for argv in (["-n", "densenet"], ["--net_type", "densenet"], ["-ndensenet"]):
        assert parse(Judge, "eval", argv)[0].net_type == "densenet"
    with pytest.raises(UserError, match="unknown flag -m"):
        parse(Judge, "eval", ["-m", "densenet"])
    assert peek(["-n", "densenet"], ("n",)) == {"n": "densenet"}


def test_optional_values(config):
    assert read("--window", "4").match.window == 4
    assert read("--window", "none").match.window is None
    assert read(*config("distill: {window: 4}"), "--window", "None").match.window is None
    assert read(*config("distill: {window: null}")).match.window is None


def test_whole_numbers_stay_exact():
    assert read("--iterations", "9007199254740993").iterations == 9007199254740993
    assert read("--iterations", "2e3").iterations == 2000


def test_keys_of_peers_are_passed_over_in_common_only(config):
    cfg, given = parse(Distill, "distill", config("common: {num_eval: 3, nets: 3}\neval: {what: ever}"), peers=(Eval,))
    assert cfg == Distill() and given == set()
    fails("unknown key 'num_eval' in 'distill'", *config("distill: {num_eval: 3}"))
    with pytest.raises(UserError, match="unknown key 'num_eval' in 'common'"):
        parse(Distill, "distill", config("common: {num_eval: 3}"))


def test_method_at_the_top(config):
    assert read(*config("method: mtt")).method == "mtt"
    assert read(*config("method: mtt"), "--method", "podd").method == "podd"


@pytest.mark.parametrize(
    "match, argv",
    [
        (
            r"unknown flag --syn_step \(did you mean '--syn_steps'\?\); distill\.py --help lists all",
            ["--syn_step", "3"],
        ),
        (r"unknown flag --iteratoin \(did you mean '--iterations'\?\)", ["--iteratoin=3"]),
        ("unknown flag --syn;|unknown flag --syn ", ["--syn", "3"]),  # no abbreviations
        ("unexpected word 'stray'; flags start with --", ["stray"]),
        ("--syn_steps takes a whole number, not 'many'", ["--syn_steps", "many"]),
        (r"--syn_steps takes a whole number, not '2\.5'", ["--syn_steps", "2.5"]),
        ("--syn_steps takes a whole number, not 'inf'", ["--syn_steps", "inf"]),
        ("--syn_steps takes a whole number, not 'nan'", ["--syn_steps", "nan"]),
        ("--syn_steps is 0; it must be at least 1", ["--syn_steps", "0"]),
        (r"--lr_img is 0\.0; it must be greater than 0", ["--lr_img", "0"]),
        ("--lr_img takes a number, not nan", ["--lr_img", "nan"]),
        ("--lr_img takes a number, not inf", ["--lr_img", "inf"]),
        ("--lr_img takes a number, not 'fast'", ["--lr_img", "fast"]),
        ("--draw takes true or false, not 'maybe'", ["--draw", "maybe"]),
        ("--window takes a whole number or none, not 'x'", ["--window", "x"]),
        ("--ks takes a list of values, each a whole number, not", ["--ks", "1", "x"]),
        ("--ks is 0; it must be at least 1", ["--ks", "5", "0"]),
        (r"--mode does not know 'exat' \(did you mean 'exact'\?\); choose from exact, unroll, det", ["--mode", "exat"]),
        (r"--encoders does not know 'birt' \(did you mean 'bert'\?\)", ["--encoders", "clip", "birt"]),
        ("--window 9 exceeds --syn_steps 8", ["--window", "9"]),
        ("expected one argument", ["--note"]),
        ("no config file gone.yaml", ["--config", "gone.yaml"]),
    ],
)
def test_mistakes_on_the_command_line(match, argv):
    fails(match, *argv)


@pytest.mark.parametrize(
    "match, text",
    [
        (r"row\.yaml: unknown key 'syn_step' in 'distill' \(did you mean 'syn_steps'\?\)", "distill: {syn_step: 3}"),
        (r"row\.yaml: unknown key 'mod' in 'common' \(did you mean 'mode'\?\)", "common: {mod: 3}"),
        ("unknown block 'distil'; blocks are method, common, buffer, distill, eval", "distil: {syn_steps: 3}"),
        (r"row\.yaml: syn_steps takes a whole number, not 'True'", "distill: {syn_steps: yes}"),
        (r"row\.yaml: syn_steps takes a whole number, not '\[3\]'", "distill: {syn_steps: [3]}"),
        (r"row\.yaml: syn_steps takes a whole number, not 'None'", "distill: {syn_steps: }"),
        (r"row\.yaml: lr_img takes a number, not 'True'", "distill: {lr_img: true}"),
        (r"row\.yaml: encoders takes a list of values, each text, not 'None'", "distill: {encoders: }"),
        (r"row\.yaml: encoders takes a list of values, each text, not", "distill: {encoders: {nfnet: 1}}"),
        (r"row\.yaml: mode does not know 'x'; choose from", "distill: {mode: x}"),
        ("block 'distill' of .* is not keys and values", "distill: [1]"),
        ("holds list, not keys and values", "[1, 2]"),
        ("is not valid YAML", "distill: {a: "),
    ],
)
def test_mistakes_in_yaml(config, match, text):
    fails(match, *config(text))


def test_config_that_is_a_folder_or_no_text(tmp_path):
    fails("is a folder; name a .yaml file in it", "--config", str(tmp_path))
    (tmp_path / "row.yaml").write_bytes(b"\xff\xfe\x00")
    fails("is not valid YAML", "--config", str(tmp_path / "row.yaml"))


def test_recorded_values_are_checked_too():
    fails("recorded syn_steps is 0; it must be at least 1", base={"syn_steps": 0})


def test_an_empty_file_changes_nothing(config):
    assert read(*config("")) == read(*config("common:\ndistill:\n")) == Distill()


def test_dump_is_read_back(config):
    steps = ["--syn_steps", "3", "--window", "2", "--mode", "unroll", "--lr_img", "1e-5"]
    argv = [*steps, "--draw", "--ks", "1", "3", "--encoders", "clip", "--note"]
    for note in ("größe: #1 'x'", "1e-2", "none", "yes", ""):
        cfg = read(*argv, note)
        text = dump(cfg, "distill", "vldd")
        assert read(*config(text)) == cfg
        assert yaml.safe_load(text)["method"] == "vldd"
    assert read(*config(dump(Distill(), "distill", "vldd"))) == Distill()


def test_flat_and_differences():
    cfg = read("--syn_steps", "3")
    assert flat(cfg)["syn_steps"] == 3 and flat(cfg)["ks"] == [1, 5, 10]
    assert differences(flat(cfg), cfg) == []
    # `iterations` may change from a run to its resumption; syn_steps may not; unknown names are another version's.
    later = read("--iterations", "9", "--ks", "1")
    old = flat(cfg) | {"gone": 1}
    assert differences(old, later) == ["syn_steps was 3, is 8", "ks was [1, 5, 10], is [1]"]


def test_peek(config):
    file = config("method: mtt\ncommon: {dataset: toy}\ndistill: {name: late}\n")
    assert peek(["--method", "podd", "--what", "--ever", "3"], ["method"]) == {"method": "podd"}
    assert peek([*file, "--name", "x"], ["method", "name", "dataset", "none"]) | {"config": ""} == {
        "method": "mtt",
        "name": "x",
        "dataset": "toy",
        "config": "",
    }
    several = config("eval: {files: [a.pt, b.pt], others: []}\n")
    assert (
        peek(several, ["files", "others"])["files"] == "a.pt" == peek(["--files", "a.pt", "b.pt"], ["files"])["files"]
    )
    assert "others" not in peek(several, ["files", "others"])
    assert peek([], ["method"]) == peek(["--meth", "podd"], ["method"]) == {}
    with pytest.raises(UserError, match="--method"):
        peek(["--method"], ["method"])


def test_another_default():
    """All else is as it was, and in its place."""

    @dataclass(frozen=True)
    class Quick(MatchConfig):
        mode: str = with_default("detached", MatchConfig, "mode")

    old, new = options_of(MatchConfig), options_of(Quick)
    assert list(new) == list(old) and new["mode"].default == Quick().mode == "detached"
    assert new["mode"].choices == old["mode"].choices and new["mode"].help == old["mode"].help
    assert MatchConfig().mode == "exact"


def test_options_of_opens_sections_in_order():
    found = options_of(Distill)
    assert list(found)[:6] == ["method", "syn_steps", "lr_img", "mode", "window", "draw"]
    assert found["syn_steps"].path == ("match", "syn_steps") and found["syn_steps"].group == "match"

    @dataclass(frozen=True)
    class Twice:
        syn_steps: int = option(1, "again")
        match: MatchConfig = section(MatchConfig)

    with pytest.raises(AssertionError, match="syn_steps"):
        options_of(Twice)


def test_help_lists_each_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "Learn a small set." in text and "inner steps (default: 8)" in text
    assert "100 % optional (default: False)" in text and "[exact, unroll, detached] (default: exact)" in text


def test_options_that_do_nothing_are_named():
    assert idle_options(read("--window", "3")) == idle_options(read("--mode", "unroll")) == []
    found = idle_options(read("--mode", "unroll", "--window", "3"))
    assert found == ["--window 3 does nothing without --mode exact"]


def test_what_holds_a_section_may_know_that_an_option_of_it_does_nothing():
    @dataclass(frozen=True)
    class Eval:
        match: MatchConfig = section(MatchConfig)

        def idle(self) -> dict[str, str]:
            return {"syn_steps": "--data distilled"}

    cfg, _ = parse(Eval, "eval", ["--syn_steps", "3", "--mode", "unroll", "--window", "3"])
    assert [line.split(" does nothing")[0] for line in idle_options(cfg)] == ["--syn_steps 3", "--window 3"]


@pytest.mark.parametrize("word", ["9" * 25, "1e30", "-" + "9" * 400])
def test_whole_numbers_that_no_tensor_holds(word, config):
    fails("syn_steps takes a whole number", "--syn_steps", word)
    fails("syn_steps takes a whole number", *config(f"distill: {{syn_steps: {word}}}"))


def test_text_that_no_file_holds(config):
    fails(r"--mode is .*which no UTF-8 file can hold", "--mode", "a\udcff")
    fails("which no UTF-8 file can hold", *config('distill: {mode: "a\\0b"}'))


def test_nothing_is_made_of_a_lone_pair_of_dashes_in_silence():
    with pytest.raises(UserError, match="--syn_steps=-- has no value that can be read"):
        peek(["--syn_steps=--"], ())


def test_a_long_value_is_shown_in_part():
    with pytest.raises(UserError) as told:
        read("--syn_steps", "x" * 5000)
    assert len(str(told.value)) < 400
