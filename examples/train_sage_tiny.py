"""Trains sage-tiny, the small Qwen3 model in the package, on two CPU cores, and exports it.

STAGES teach sums, words and facts; TOOL_STAGES then teach tools and JSON. The shipped weights
passed STAGES in 90 minutes of two cores. Later `--resume FOLDER` took them through TOOL_STAGES:
2,160 steps in 40 minutes of one core, which other programs used too. Without --resume the script
does both, one after the other.
"""

import argparse
import json
import math
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import cast

import jinja2
import torch
from exercises import (
    KINDS,
    NAMES,
    Exercise,
    Message,
    as_json,
    drill,
    exercise,
    exercises,
    fact_sentence,
    facts,
    prose,
    recall_of,
    sentences,
    word,
)
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tool_exercises import NO_TOOL_KINDS, TOOL_KINDS, tool_exercises, toolbox, turn, written
from torch import Tensor, nn
from torch.nn import functional as F

SPECIAL = ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CALL = ("<tool_call>", "</tool_call>")  # a reader that skips special tokens still sees calls
RESULT = "<|tool|>"
END_OF_TEXT, END, SYSTEM, USER, ASSISTANT = range(256, 261)
TOOL = 263
CHAT_TEMPLATE = (
    # A line shows what a call needs of a tool: its name, its arguments, their types; "?": optional.
    "{% if tools %}{{ '<|system|>' }}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n' }}{% endif %}"
    "{{ '# Tools' }}{% for tool in tools %}"
    "{% set parameters = tool['function']['parameters'] or {} %}"
    # A look-up in a list for each argument would take time quadratic in what a client sends.
    "{% set required = dict.fromkeys(parameters['required'] or []) %}"
    "{{ '\n' + tool['function']['name'] + '(' }}"
    "{% for name, schema in (parameters['properties'] or {}).items() %}"
    "{{ '' if loop.first else ', ' }}{{ name }}"
    "{{ '' if name in required else '?' }}"
    "{% set kind = schema['type'] or [] %}{% if kind %}"
    "{{ ': ' }}{{ kind if kind is string else kind | join('|') }}{% endif %}"
    "{% endfor %}{{ ')' }}{% endfor %}{{ '<|end|>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if not (tools and loop.first and message['role'] == 'system') %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['tool_calls'] %}"
    "{% if message['content'] %}{{ message['content'] + '\n' }}{% endif %}"
    "{% for call in message['tool_calls'] %}{% set given = call['function']['arguments'] %}"
    "{{ '' if loop.first else '\n' }}"
    "{{ '<tool_call>\n{\"name\": ' + (call['function']['name'] | tojson) + ', \"arguments\": ' }}"
    "{{ given if given is string else given | tojson }}{{ '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|end|>' }}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are sage-tiny.", "Answer briefly.")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the decoder, named as in a Qwen3 config.json."""

    vocab_size: int = 264
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


@dataclass(frozen=True, slots=True)
class Recall:
    """A share of the rows, with up to so many facts and so many bytes of filler between them."""

    share: float
    max_facts: int
    max_gap: int


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training, up to a share of its time: sizes, and what rows are made of."""

    until: float
    seq_len: int
    num_rows: int
    recall: Recall
    drills: float  # share of the rows
    turns: dict[str, float]  # kinds of question
    drill_kinds: dict[str, float]
    tools: float = 0.0  # share of the rows
    schemas: float = 0.0  # share of the rows
    lr: float = 1.0  # of the rates of `optimizers`


# Calls and JSON are long, and most of their bytes are plain at once.
ANSWER_WEIGHTS = {"sum": 2.0, "count": 3.0, "tool_answer": 0.6, "schema": 0.6}

# What is learnt slowly comes often, and first what is learnt late: sums and copying, then counts.
EARLY = {"sum": 0.4, "count": 0.25, "sort": 0.15, "reverse": 0.12, "copy": 0.08}
LATE = {"sum": 0.12, "count": 0.38, "sort": 0.3, "reverse": 0.1, "copy": 0.1}
EARLY_DRILLS = {"sum": 0.5, "count": 0.5}
LATE_DRILLS = {"sum": 0.15, "count": 0.5, "sort": 0.35}

STAGES = (
    Stage(0.20, 192, 20, Recall(0.35, 4, 0), 0.4, EARLY, EARLY_DRILLS),
    Stage(0.45, 192, 20, Recall(0.4, 4, 60), 0.3, EARLY, EARLY_DRILLS),
    Stage(1.01, 640, 6, Recall(0.55, 6, 400), 0.25, LATE, LATE_DRILLS),
)
# Calls and JSON are learnt last, among as many rows of before, so that nothing is forgotten.
TOOL_STAGES = (
    Stage(1.01, 512, 6, Recall(0.5, 5, 300), 0.1, LATE, LATE_DRILLS, 0.3, 0.15, lr=1 / 3),
)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding over the two halves of the last axis, as Qwen3 does it."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, head = shape.hidden_size, shape.head_dim
        self.head_dim = head
        self.num_groups = shape.num_attention_heads // shape.num_key_value_heads
        self.q_proj = nn.Linear(width, shape.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(width, shape.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(width, shape.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(shape.num_attention_heads * head, width, bias=False)
        self.q_norm = nn.RMSNorm(head, shape.rms_norm_eps)
        self.k_norm = nn.RMSNorm(head, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:-1], -1, self.head_dim)

        q = rotate(self.q_norm(heads(self.q_proj(x))).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(heads(self.k_proj(x))).transpose(1, 2), cos, sin)
        v = heads(self.v_proj(x)).transpose(1, 2)
        k, v = (y.repeat_interleave(self.num_groups, dim=1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return mixed


class Mlp(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = Mlp(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """The decoder; its parameter names are those of Qwen3 less the leading "model."."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(12) if is_output else 0.05)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [rows, positions, vocabulary] of ids [rows, positions]."""
        x = self.embed_tokens(ids)
        cos, sin = (table.to(x.dtype) for table in self._rope(ids))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def _rope(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, self.shape.head_dim, 2, device=ids.device) / self.shape.head_dim
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        angles = torch.outer(positions, self.shape.rope_theta**-half).repeat(1, 2)
        return angles.cos(), angles.sin()


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for the matrices between embeddings (Jordan et al., 2024).

    It needs about half the steps of AdamW here. Matrices of one shape go through the
    Newton-Schulz iteration as one batch; torch.optim.Muon works in bf16, slow on these cores.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float) -> None:
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                self._step_batch(weights, group["lr"])

    def _step_batch(self, weights: list[nn.Parameter], lr: float) -> None:
        lookahead = []
        for weight in weights:
            momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
            assert weight.grad is not None
            momentum.lerp_(weight.grad, 0.05)
            lookahead.append(weight.grad.lerp(momentum, 0.95))
        rows, columns = weights[0].shape
        scale = lr * math.sqrt(max(1.0, rows / columns))
        for weight, update in zip(weights, orthogonal(torch.stack(lookahead)), strict=True):
            weight.mul_(1 - lr * 0.02).sub_(update, alpha=scale)


def orthogonal(batch: Tensor) -> Tensor:
    """Each matrix with its singular values moved close to one (quintic Newton-Schulz)."""
    is_tall = batch.shape[1] > batch.shape[2]
    x: Tensor = batch.mT if is_tall else batch
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if is_tall else x


@dataclass(slots=True)
class Row:
    """One training sequence: ids, and how much each counts as a target."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, ids: list[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def add_turn(self, turn: Exercise) -> None:
        """A question, which counts little, and what the model writes, which counts in full."""
        weight = ANSWER_WEIGHTS.get(turn.kind, 1.0)
        self.add([USER, *encode(turn.prompt), END], 0.03)
        for message in turn.history:
            if message["role"] == "tool":
                self.add([TOOL, *encode(message["content"]), END], 0.03)
            else:
                self.add_answer(written(message), weight)
        self.add_answer(turn.answer, weight)

    def add_answer(self, text: str, weight: float) -> None:
        self.add([ASSISTANT], 0.03)
        self.add([*encode(text), END], weight)

    def add_drill(self, kind: str, asked: str, answer: str) -> None:
        """The same exercise without the words around it: more answers for the time."""
        self.add([*asked.encode()], 0.0)
        self.add([*answer.encode(), ord("\n")], ANSWER_WEIGHTS.get(kind, 1.0))


def pick(rng: Random, shares: dict[str, float]) -> str:
    """One of the names, as often as its share says."""
    (name,) = rng.choices(list(shares), list(shares.values()))
    return name


class Corpus:
    """Endless training rows: exercises as conversations, and Python's own library as text."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.text = library_text()

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """ids and target weights, [rows, seq_len + 1] each."""
        rows = [self._row(stage) for _ in range(stage.num_rows)]
        size = stage.seq_len + 1
        ids = torch.tensor([row.ids[:size] for row in rows])
        return ids, torch.tensor([row.weights[:size] for row in rows])

    def _row(self, stage: Stage) -> Row:
        row = Row()
        if self.rng.random() < 0.08:
            start = self.rng.randrange(len(self.text) - stage.seq_len - 1)
            row.add(list(self.text[start : start + stage.seq_len + 1]), 0.2)
            return row
        if self.rng.random() < stage.drills:
            row.add([ASSISTANT], 0.0)  # not to be taken for plain text
            while len(row.ids) <= stage.seq_len:
                kind = pick(self.rng, stage.drill_kinds)
                row.add_drill(kind, *drill(kind, self.rng))
            return row
        turns = self._turns(stage, row)
        while len(row.ids) <= stage.seq_len:
            row.add_turn(next(turns))
        return row

    def _turns(self, stage: Stage, row: Row) -> Iterator[Exercise]:
        """The questions of a row, after its system turn, which is added here."""
        share = self.rng.random()
        if share < stage.tools:
            return self._tool_turns(row)
        if self.rng.random() < 0.2:
            row.add([SYSTEM, *self.rng.choice(SYSTEM_PROMPTS).encode(), END], 0.03)
        if share < stage.tools + stage.schemas:
            return self._schemas(stage)
        is_recall = self.rng.random() < stage.recall.share
        return self._recalls(stage) if is_recall else self._singles(stage)

    def _tool_turns(self, row: Row) -> Iterator[Exercise]:
        """Questions beside tools: most need one of them. The system turn shows the tools."""
        tools = toolbox(self.rng, self.rng.randint(1, 3))
        system = self.rng.choice(("", "", prose(self.rng), *SYSTEM_PROMPTS))
        messages = [{"role": "system", "content": system}] if system else []
        row.add(encode(render(messages, tuple(tool.message for tool in tools))), 0.03)
        can_add = any(tool.aspect == "sum" for tool in tools)
        plain = [kind for kind in NO_TOOL_KINDS if not (can_add and kind == "sum")]
        while True:
            if self.rng.random() < 0.25:
                yield exercise(self.rng.choice(plain), self.rng, held_out=False)
            else:
                yield turn(self.rng, self.rng.choice(tools), held_out=False)

    def _schemas(self, stage: Stage) -> Iterator[Exercise]:
        singles = self._singles(stage)
        while True:
            yield exercise("schema", self.rng, held_out=False)
            if self.rng.random() < 0.3:
                yield next(singles)

    def _singles(self, stage: Stage) -> Iterator[Exercise]:
        while True:
            kind = pick(self.rng, stage.turns)
            yield self._copy() if kind == "copy" else exercise(kind, self.rng, held_out=False)

    def _copy(self) -> Exercise:
        """Repeating random words: not graded, but the shortest way to heads that copy."""
        phrase = " ".join(word(self.rng) for _ in range(self.rng.randint(1, 4)))
        return Exercise("copy", f"Repeat: {phrase}", phrase)

    def _recalls(self, stage: Stage) -> Iterator[Exercise]:
        """Facts with filler between them, then questions for each; many answers for one reading."""
        names = self._names(self.rng.randint(1, stage.recall.max_facts))
        known = facts(self.rng, names, held_out=False)
        stated = [fact_sentence(self.rng, fact) for fact in known]
        stated += sentences(self.rng, self.rng.randint(0, stage.recall.max_gap), self._filler)
        self.rng.shuffle(stated)
        first, *rest = (recall_of(self.rng, fact) for fact in self.rng.sample(known, len(known)))
        yield Exercise("recall", " ".join([*stated, first.prompt]), first.answer)
        yield from rest
        singles = self._singles(stage)
        while True:
            yield recall_of(self.rng, self.rng.choice(known))
            if self.rng.random() < 0.4:
                yield next(singles)

    def _names(self, num: int) -> list[str]:
        """Mostly the listed names; made-up ones too, so that it is the spelling that is matched."""
        names = self.rng.sample(NAMES, num)
        return [n if self.rng.random() < 0.75 else word(self.rng).capitalize() for n in names]

    def _filler(self, rng: Random) -> str:
        if rng.random() < 0.7:
            return prose(rng)
        start = rng.randrange(len(self.text) - 80)
        snippet = self.text[start : start + rng.randint(20, 80)].decode(errors="ignore")
        return " ".join(snippet.split())


def library_text(max_bytes: int = 4_000_000) -> bytes:
    """Sources of the running Python's standard library, one after the other."""
    found = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return b"".join(path.read_bytes() + b"\n" for path in found)[:max_bytes]


def loss_of(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of each next token."""
    logits = model(ids[:, :-1]).flatten(0, 1)
    losses = F.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


@torch.no_grad()
def is_right(model: nn.Module, item: Exercise, device: str) -> bool:
    """Whether greedy decoding gives the answer and then ends.

    One forward pass over prompt and answer tells: greedy decoding gives the answer exactly if
    each of its tokens is the likeliest after those before it.
    """
    answer = [*encode(item.answer), END]
    prompt = encode(render(item.messages, item.tools, add_generation_prompt=True))
    ids = torch.tensor([prompt + answer], device=device)
    likeliest = model(ids[:, :-1]).argmax(dim=-1)
    return torch.equal(likeliest[0, -len(answer) :], ids[0, -len(answer) :])


def accuracies(model: nn.Module, n: int, device: str, seed: int = 1) -> dict[str, float]:
    """The share of n held-out exercises answered right, by kind."""
    asked = {kind: exercises(kind, n, seed) for kind in KINDS}
    asked |= {kind: tool_exercises(kind, n, seed) for kind in TOOL_KINDS}
    return {
        kind: sum(is_right(model, item, device) for item in items) / n
        for kind, items in asked.items()
    }


def rounded(model: Decoder, dtype: torch.dtype) -> Decoder:
    """A copy with the weights as exported, rounded to bf16, that computes in dtype."""
    copy = Decoder(model.shape)
    copy.load_state_dict({name: w.bfloat16() for name, w in model.state_dict().items()})
    return copy.bfloat16().to(dtype)


def export(model: Decoder, folder: Path) -> None:
    """Writes the folder that `from_pretrained` reads: weights, configs and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": w.bfloat16().cpu() for name, w in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is made readable by its owner only
    tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", model_config(model.shape))
    write_json(
        folder / "generation_config.json",
        {"do_sample": False, "eos_token_id": [END, END_OF_TEXT], "pad_token_id": END_OF_TEXT},
    )
    write_json(folder / "tokenizer_config.json", tokenizer_config(model.shape))
    write_json(folder / "modules.json", pooling_steps())
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})


def pooling_steps() -> list[dict[str, object]]:
    """The modules.json of sentence-transformers: vectors are means of rows, of length 1."""
    steps = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    return [
        {"idx": number, "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (name, path) in enumerate(steps)
    ]


def write_json(path: Path, content: object) -> None:
    """Writes JSON with a line a key."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def model_config(shape: Shape) -> dict[str, object]:
    """The Qwen3 config.json; rope_theta stands twice, for readers of the older form."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": END_OF_TEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
    } | {name: getattr(shape, name) for name in Shape.__slots__}


def tokenizer() -> Tokenizer:
    """A byte is a token and its own id; the special tokens follow."""
    letters = byte_letters()
    made = Tokenizer(
        models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    made.add_tokens([AddedToken(t, special=False, normalized=False) for t in CALL])
    made.add_special_tokens([AddedToken(RESULT, special=True)])
    return made


@cache
def _tokenizer() -> Tokenizer:
    return tokenizer()


def encode(text: str) -> list[int]:
    """The ids of a text that may hold special tokens."""
    ids: list[int] = _tokenizer().encode(text, add_special_tokens=False).ids
    return ids


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = as_json
    return environment.from_string(CHAT_TEMPLATE)


def render(
    messages: Sequence[Message],
    tools: Sequence[Message] = (),
    *,
    add_generation_prompt: bool = False,
) -> str:
    """A conversation as the chat template writes it."""
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    return _template().render(messages=messages, **options)


def byte_letters() -> list[str]:
    """The letter that stands for each byte in GPT-2's byte-level alphabet."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(b if b in shown else 256 + hidden.index(b)) for b in range(256)]


def tokenizer_config(shape: Shape) -> dict[str, object]:
    """The tokenizer_config.json, chat template included."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_position_embeddings,
        "eos_token": "<|end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def optimizers(model: Decoder) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [w for w in model.layers.parameters() if w.ndim == 2]
    others = [w for w in model.parameters() if all(w is not m for m in matrices)]
    adam = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    built = [Muon(matrices, lr=0.02), adam]
    for group in (group for one in built for group in one.param_groups):
        group["peak_lr"] = group["lr"]
    return built


def lr_factor(step: int, progress: float) -> float:
    """Warm-up over 100 steps, then flat, then down to zero over the last 40 %."""
    return min(1.0, (step + 1) / 100, (1.0 - progress) / 0.4)


def train(
    model: Decoder, stages: tuple[Stage, ...], steps: int, minutes: float, args: argparse.Namespace
) -> None:
    """Trains for so many steps, or faster through the same stages where there is less time."""
    # Fused, a step takes a third less time; compiling a shape takes half a minute.
    fused: nn.Module = model
    if steps > 100:
        fused = cast(nn.Module, torch.compile(model, dynamic=False))
    opts = optimizers(model)
    corpus = Corpus(args.seed)
    started, step, progress = time.monotonic(), 0, 0.0
    while step < steps and progress < 1.0:
        stage = next(stage for stage in stages if progress < stage.until)
        factor = stage.lr * lr_factor(step, progress)
        loss = update(fused, opts, corpus.batch(stage), factor, args.device)
        step += 1
        elapsed_s = time.monotonic() - started
        progress = max(step / steps, elapsed_s / (60 * minutes))
        if step % 50 == 0:
            print(f"{elapsed_s:7.0f} s  step {step}  {stage.seq_len}  loss {loss:.4f}", flush=True)
        if step % args.eval_every == 0:
            report(model, 40, args.device)
            export(model, args.out)


def update(
    model: nn.Module,
    opts: list[torch.optim.Optimizer],
    batch: tuple[Tensor, Tensor],
    factor: float,
    device: str,
) -> float:
    """One optimizer step; returns the loss."""
    loss = loss_of(model, *(part.to(device) for part in batch))
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group["peak_lr"] * factor
        opt.step()
        opt.zero_grad()
    return loss.item()


def report(model: nn.Module, n: int, device: str) -> None:
    """Prints the held-out accuracies."""
    shares = accuracies(model, n, device).items()
    print("held out:", "  ".join(f"{kind} {share:.1%}" for kind, share in shares), flush=True)


def load(folder: Path) -> Decoder:
    """The decoder with the weights of an exported folder."""
    model = Decoder(Shape())
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): w.float() for name, w in stored.items()})
    return model


def main() -> None:
    """Trains, exports, and reports on the exported weights in fp32 and bf16."""
    parser = argparse.ArgumentParser(description="Trains sage-tiny and exports it.")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="go on from these weights with the tools"
    )
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--minutes", type=float, default=90.0, help="finish within this time")
    parser.add_argument("--tool-steps", type=int, default=5000)
    parser.add_argument("--tool-minutes", type=float, default=40.0, help="the same, for the tools")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--eval-every", type=int, default=250)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = (load(args.resume) if args.resume else Decoder(Shape())).to(args.device)
    if not args.resume:
        train(model, STAGES, args.steps, args.minutes, args)
    train(model, TOOL_STAGES, args.tool_steps, args.tool_minutes, args)
    export(model, args.out)
    for dtype in (torch.float32, torch.bfloat16):
        print(f"exported weights, computed in {dtype}")
        report(rounded(model.cpu(), dtype), 2 if args.tool_steps < 100 else 200, "cpu")


if __name__ == "__main__":
    main()
