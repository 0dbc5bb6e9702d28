"""Seeded mistakes in a YAML file: each gives one diagnostic with a position and a useful hint."""

import pytest

from sagellm.graphs.check import EngineFactsView, Facts, check, locate
from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.text.yaml import load
from sagellm.graphs.vocabulary import Vocabulary

PD = """\
sagellm: 1
name: pd
engines:
  p: {model: sage-tiny}
  d: {model: sage-tiny}
operators:
  admission: {op: admission, max_queued: 1024}
  sort:      {op: policy_sort, policy: slo_aware}
  split:     {op: pd_split, min_uncached_tokens: 32}
  route:     {op: route, strategy: load_balanced}
  prefill:   {op: prefill, engine: p}
  transfer:  {op: kv_transfer}
  decode:    {op: decode, engine: d}
  generate:  {op: generate, engine: d}
  metrics:   {op: metrics_sink}
edges:
  - source -> admission -> sort -> split
  - split.disaggregated -> route -> prefill -> transfer -> decode -> metrics -> sink
  - split.aggregated -> generate -> metrics
executor: {kind: tasks}
"""
TASKS = "executor: {kind: tasks}\n"


def budgets(options: str) -> str:
    return TASKS + f"budgets: {{{options}}}\n"


MOVES = frozenset({"kv_transfer"})
CAPABLE = EngineFactsView(model_hash="m", dtype="float32", block_size=16, capabilities=MOVES)
FACTS = Facts(functions=frozenset({"guard"}), engines={"p": CAPABLE, "d": CAPABLE})


def diagnosed(text: str, vocabulary: Vocabulary, facts: Facts = FACTS) -> list[str]:
    """The diagnostics, one a line: `file:line:column: message (hint)`."""
    try:
        document = load(text, file="pd.yaml")
    except GraphError as error:
        return [str(found) for found in error.diagnostics]
    return list(map(str, locate(check(document.graph, vocabulary, facts), document.positions)))


def test_the_unbroken_file_is_right(vocabulary: Vocabulary) -> None:
    assert diagnosed(PD, vocabulary) == []


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "word", "hint"),
    [
        ("sagellm: 1", "sagellm: 3", 1, 10, "version 3", "`sagellm: 1`"),
        ("executor:", "exekutor:", 20, 1, "unknown key `exekutor`", "`executor`"),
        ("op: route", "opp: route", 10, 3, "`op`", "`opp`"),
        ("max_queued: 1024", "max_queued: 1, max_queued: 2", 7, 45, "twice", "line 7"),
        ("split.aggregated ->", "split.aggregated >", 19, 5, "neither", "->"),
        (
            "-> sort -> split",
            "-> split.aggregated -> sort",
            17,
            34,
            "inlet or an outlet",
            "two edges",
        ),
        ("op: kv_transfer", "op: kv_transfr", 12, 19, "unknown op `kv_transfr`", "`kv_transfer`"),
        ("max_queued: ", "max_queud: ", 7, 30, "no option `max_queud`", "`max_queued`"),
        ("max_queued: 1024", "max_queued: yes", 7, 42, "an integer, not `yes`", "an integer"),
        ("max_queued: 1024", "max_queued: 0", 7, 42, "at least 1", "at least 1"),
        ("policy: slo_aware", "policy: slo_awar", 8, 40, "one of `fifo`", "`slo_aware`"),
        ("policy: slo_aware", "window: 99", 8, 40, "from 1 to 64, not `99`", "from 1 to 64"),
        ("policy: slo_aware", "share: high", 8, 39, "a number or null", "a number or null"),
        (", engine: p", "", 11, 3, "needs `engine`", "add `engine: a text`"),
        ("engine: p", "engine: q", 11, 36, "no engine is called `q`", "there are d, p"),
        ("engine: p", "engine: d", 4, 3, "no operator uses engine `p`", "remove it"),
        ("-> route ->", "-> rout ->", 18, 28, "no operator is called `rout`", "`route`"),
        ("split.aggregated", "split.agregated", 19, 11, "no outlet `agregated`", "`aggregated`"),
        ("-> metrics\n", "-> metrics.event\n", 19, 45, "no inlet `event`", "there are in"),
        ("  - split.a", "  - decode.terminal -> sink\n  - split.a", 19, 12, "no outlet", "without"),
        ("source -> admission", "admission", 16, 1, "no edge leaves", "source -> admission"),
        ("metrics -> sink", "metrics", 16, 1, "no edge reaches `sink`", "metrics -> sink"),
        ("-> generate -> metrics", "-> generate", 14, 3, "leads nowhere", "`generate -> ...`"),
        ("-> metrics\n", "-> split\n", 19, 37, "cycle", "`generate ~> split`"),
        ("-> transfer ->", "->", 12, 3, "ever reaches `transfer`", "... -> transfer"),
        ("-> sort -> split", "-> split", 8, 3, "ever reaches `sort`", "... -> sort"),
        ("-> generate -> metrics", "-> metrics", 14, 3, "reaches `generate`", "-> generate"),
        (
            "  - split.aggregated",
            "  - route -> metrics\n  - split.aggregated",
            19,
            5,
            "one owner",
            "two",
        ),
        ("kind: tasks", "kind: task", 20, 18, "unknown kind of executor: `task`", "`tasks`"),
        (TASKS, budgets("slo_ttft: 1"), 21, 11, "no option `slo_ttft`", "`slo_ttft_s`"),
        (TASKS, budgets("slo_ttft_s: 0"), 21, 23, "at least", "at least"),
        (
            TASKS,
            budgets("ttft_shares: {srot: 0.5}"),
            21,
            25,
            "is called `srot`",
            "`sort`",
        ),
        (TASKS, budgets("ttft_shares: {sort: 1.5}"), 21, 31, "from 0 to 1, not 1.5", "0.25"),
        (
            TASKS,
            budgets("tpot_shares: {sort: 0.5, decode: 0.6}"),
            21,
            11,
            "up to `decode` sum to 1.1, which is above 1",
            "lower",
        ),
        ("kind: tasks", "kind: tasks, size: 2", 20, 25, "no option `size`", "there are none"),
    ],
)
def test_a_mistake_is_told_once_in_its_place(
    vocabulary: Vocabulary, old: str, new: str, line: int, column: int, word: str, hint: str
) -> None:
    assert PD.count(old) >= 1
    (told,) = diagnosed(PD.replace(old, new, 1), vocabulary)
    message, _, fix = told.rpartition(" (")
    assert message.startswith(f"pd.yaml:{line}:{column}: ")
    assert word in message
    assert hint in fix


def test_shares_of_alternative_paths_may_each_sum_to_one(vocabulary: Vocabulary) -> None:
    shares = "ttft_shares: {sort: 0.5, prefill: 0.4, transfer: 0.1, generate: 0.5}"
    assert diagnosed(PD + f"budgets: {{slo_ttft_s: 2, {shares}}}\n", vocabulary) == []


WRONG_ITEM = PD.replace("-> transfer -> decode -> metrics ->", "-> metrics ->").replace(
    "  transfer:  {op: kv_transfer}\n  decode:    {op: decode, engine: d}\n", ""
)
UNMOVED = PD.replace("-> transfer ->", "->").replace("  transfer:  {op: kv_transfer}\n", "")
REPLICAS = PD.replace("d: {model: sage-tiny}", "d: {model: sage-tiny, replicas: 2}")
FUNCTION = PD.replace("kv_transfer}", "kv_transfer}\n  guard: {op: map, function: gard}").replace(
    "-> metrics -> sink", "-> metrics -> guard -> sink"
)


@pytest.mark.parametrize(
    ("text", "start", "word", "hint"),
    [
        (
            WRONG_ITEM,
            "pd.yaml:16:48",
            "takes answer or embedding or event, not prefilled",
            "`decode`",
        ),
        (UNMOVED, "pd.yaml:12:3", "nothing moves the KV blocks", "op: kv_transfer"),
        (REPLICAS, "pd.yaml:14:3", "2 replicas; nothing chooses", "`op: route` before `generate`"),
        (FUNCTION, "pd.yaml:13:30", "registered as `gard`", "`guard`"),
    ],
)
def test_a_mistake_of_several_lines(
    vocabulary: Vocabulary, text: str, start: str, word: str, hint: str
) -> None:
    (told,) = diagnosed(text, vocabulary)
    message, _, fix = told.rpartition(" (")
    assert message.startswith(start)
    assert word in message
    assert hint in fix


def test_a_cut_chain_is_reported_at_both_ends(vocabulary: Vocabulary) -> None:
    told = diagnosed(PD.replace("split.aggregated -> generate", "generate"), vocabulary)
    assert told == [
        "pd.yaml:9:3: the outlet `aggregated` of `split` leads nowhere "
        "(write `split.aggregated -> ...`)",
        "pd.yaml:14:3: nothing feeds the inlet `in` of `generate` (write `... -> generate`)",
    ]


def test_many_mistakes_are_reported_in_one_pass(vocabulary: Vocabulary) -> None:
    text = PD.replace("max_queued: 1024", "max_queued: -1").replace("engine: p", "engine: q")
    text = text.replace("kind: tasks", "kind: rays").replace("op: route", "op: rout")
    starts = [told.split(": ")[0] for told in diagnosed(text, vocabulary)]
    assert starts == ["pd.yaml:7:42", "pd.yaml:10:19", "pd.yaml:11:36", "pd.yaml:20:18"]
