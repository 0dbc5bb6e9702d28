"""Small exercises with checkable answers, and the split that keeps some of them out of training."""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

KINDS = ("sum", "reverse", "sort", "count", "recall", "schema")


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


NAMES = words(
    "Ada Alan Amir Anna Bela Boris Carla Chen Clara Dana David Elena Emil Erik Fatma Felix Frida "
    "Grace Hana Hugo Ines Ivan Jana Jonas Julia Karim Kira Lars Lena Leo Lina Luca Maria Mila "
    "Nadia Nils Nora Olga Omar Oskar Paula Petra Ravi Rosa Sami Sofia Tara Theo Vera Yuki Zara Zeno"
)
CITIES = words(
    "Paris Rome Berlin Madrid London Lisbon Vienna Prague Oslo Cairo Tokyo Delhi Lima Quito Dublin "
    "Athens Warsaw Helsinki Sofia Boston Chicago Denver Toronto Sydney Seoul Dakar Nairobi Hanoi "
    "Bergen Porto Geneva Basel Hamburg Munich Malmö Zürich"
)
CITIES += ["New York", "San Francisco", "Cape Town", "Buenos Aires", "Tel Aviv"]
NOUNS = words(
    "river mill garden bridge harbour window kitchen teacher letter train market forest lamp "
    "road baker table station winter morning child"
)
ADJECTIVES = words("old quiet green small bright narrow busy early warm empty tall blue")
VERBS = words("waits rests stands turns sings sleeps opens moves stays works")
PLACES = words("near behind under above beside before across")

SUM_ASKS = ("What is {a} + {b}?", "Add {a} and {b}.", "{a} + {b} = ?")
REVERSE_ASKS = ("Reverse the word {w}.", "Write {w} backwards.")
SORT_ASKS = ("Sort the letters of {w}.", "Put the letters of {w} in order.")
COUNT_ASKS = ("How often does {c} occur in {w}?", "Count the letter {c} in {w}.")
FACTS = ("The code of {n} is {v}.", "{n} has the code {v}.")
RECALL_ASKS = ("What is the code of {n}?", "Tell me the code of {n}.")

# What a person's record says beside the name, and the ways to ask for it as JSON.
CLAUSES = {
    "age": ("is {v} years old", "is {v}", "is aged {v}"),
    "city": ("lives in {v}", "is from {v}", "comes from {v}", "works in {v}"),
    "code": ("has the code {v}", "has code {v}"),
}
SCHEMA_ASKS = (
    "{t} Answer as JSON with {f}.",
    "{t} Answer in JSON with the fields {f}.",
    "{t} Give {f} as JSON.",
    "{t} Return JSON with {f}.",
    "{t} Write JSON with the keys {f}.",
    "{t} Extract {f} as JSON.",
    "{t} JSON: {f}.",
    "Extract {f} as JSON: {t}",
    "Extract {f} as JSON. {t}",
    "Answer as JSON with {f}. {t}",
    "Give me {f} as JSON: {t}",
)

Fact = tuple[str, str]
Message = Mapping[str, Any]  # of a chat, as the OpenAI API has it


@dataclass(frozen=True, slots=True)
class Exercise:
    """One question and its only right answer.

    `tools`: functions that the model may call, as the OpenAI API has them. `history`: messages
    between the question and the answer.
    """

    kind: str
    prompt: str
    answer: str
    tools: tuple[Message, ...] = ()
    history: tuple[Message, ...] = ()

    @property
    def messages(self) -> list[Message]:
        """The conversation that the model is to go on with."""
        return [{"role": "user", "content": self.prompt}, *self.history]

    def is_answered_by(self, reply: str) -> bool:
        """Whether the reply, white space around it aside, is the answer."""
        return reply.strip() == self.answer


def is_held_out(content: str) -> bool:
    """Whether this content belongs to the tenth that training never sees (by CRC-32)."""
    return zlib.crc32(content.encode()) % 10 == 0


def draw(make: Callable[[Random], str], rng: Random, held_out: bool) -> str:
    """A content of the wanted side of the split."""
    while True:
        content = make(rng)
        if is_held_out(content) == held_out:
            return content


def word(rng: Random) -> str:
    """A made-up word of 3 to 6 letters; half of them repeat letters often."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    if rng.random() < 0.5:
        letters = "".join(rng.sample(letters, 4))
    return "".join(rng.choices(letters, k=rng.randint(3, 6)))


def pair(rng: Random) -> str:
    """Two numbers below 100."""
    return f"{rng.randrange(100)} {rng.randrange(100)}"


def _word_and_letter(rng: Random) -> str:
    drawn = word(rng)
    letter = rng.choice(drawn if rng.random() < 0.8 else "abcdefghijklmnopqrstuvwxyz")
    return f"{drawn} {letter}"


def drill(kind: str, rng: Random) -> tuple[str, str]:
    """A sum, count or sort of the trained part in few bytes: ("23+45=", "68"), ("a banana ", "3").

    The letter stands before the word, as in the questions: each letter of the word can then see
    whether it is the one that counts.
    """
    if kind == "sum":
        a, b = draw(pair, rng, False).split()
        return rng.choice(("{a}+{b}=", "{a} + {b} = ")).format(a=a, b=b), str(int(a) + int(b))
    if kind == "sort":
        drawn = draw(word, rng, False)
        return f"{drawn}>", "".join(sorted(drawn))
    drawn, letter = draw(_word_and_letter, rng, False).split()
    return f"{letter} {drawn} ", str(drawn.count(letter))


def _sum(rng: Random, held_out: bool) -> Exercise:
    a, b = draw(pair, rng, held_out).split()
    return Exercise("sum", rng.choice(SUM_ASKS).format(a=a, b=b), str(int(a) + int(b)))


def _reverse(rng: Random, held_out: bool) -> Exercise:
    drawn = draw(word, rng, held_out)
    return Exercise("reverse", rng.choice(REVERSE_ASKS).format(w=drawn), drawn[::-1])


def _sort(rng: Random, held_out: bool) -> Exercise:
    drawn = draw(word, rng, held_out)
    return Exercise("sort", rng.choice(SORT_ASKS).format(w=drawn), "".join(sorted(drawn)))


def _count(rng: Random, held_out: bool) -> Exercise:
    drawn, letter = draw(_word_and_letter, rng, held_out).split()
    prompt = rng.choice(COUNT_ASKS).format(c=letter, w=drawn)
    return Exercise("count", prompt, str(drawn.count(letter)))


def facts(rng: Random, names: list[str], held_out: bool) -> list[Fact]:
    """A four-digit code for each name, all of them on one side of the split."""

    def fact(name: str) -> Fact:
        drawn = draw(lambda r: f"{name} {r.randint(1000, 9999)}", rng, held_out)
        return name, drawn.split()[1]

    return [fact(name) for name in names]


def fact_sentence(rng: Random, fact: Fact) -> str:
    """The fact as a sentence."""
    return rng.choice(FACTS).format(n=fact[0], v=fact[1])


def recall_of(rng: Random, fact: Fact) -> Exercise:
    """The bare question for a fact stated earlier in the conversation."""
    return Exercise("recall", rng.choice(RECALL_ASKS).format(n=fact[0]), fact[1])


def prose(rng: Random) -> str:
    """A sentence that means little and states no code."""
    return (
        f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} "
        f"{rng.choice(PLACES)} the {rng.choice(NOUNS)}."
    )


def sentences(rng: Random, num_bytes: int, source: Callable[[Random], str] = prose) -> list[str]:
    """Sentences of at least num_bytes in all."""
    drawn: list[str] = []
    while sum(len(one) + 1 for one in drawn) < num_bytes:
        drawn.append(source(rng))
    return drawn


def _recall(rng: Random, held_out: bool) -> Exercise:
    asked, *others = facts(rng, rng.sample(NAMES, rng.randint(1, 4)), held_out)
    stated = [fact_sentence(rng, other) for other in others]
    num_before = rng.randint(0, len(stated))
    after = stated[num_before:] + sentences(rng, rng.randint(100, 360))
    rng.shuffle(after)
    question = recall_of(rng, asked)
    parts = [*stated[:num_before], fact_sentence(rng, asked), *after, question.prompt]
    return Exercise("recall", " ".join(parts), question.answer)


def city(rng: Random) -> str:
    """Mostly a listed city; made-up ones too, so that the spelling is copied."""
    return rng.choice(CITIES) if rng.random() < 0.6 else word(rng).capitalize()


def person(rng: Random) -> str:
    """A JSON record of name, age, city and code."""
    name = rng.choice(NAMES) if rng.random() < 0.7 else word(rng).capitalize()
    record = {"name": name, "age": rng.randint(1, 99), "city": city(rng)}
    return as_json(record | {"code": rng.randint(1000, 9999)})


def as_json(value: object) -> str:
    """JSON on one line, as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def _listed(rng: Random, parts: list[str]) -> str:
    *first, last = parts
    joined = rng.choice((" and ", ", "))
    return joined.join([", ".join(first), last]) if first else last


def _described(rng: Random, record: dict[str, Any], told: list[str]) -> str:
    """The told fields of a record, one sentence or one for each."""
    subject = record["name"]
    if "age" in told and rng.random() < 0.25:
        subject += rng.choice((", {v},", " ({v})")).format(v=record["age"])
        told = [name for name in told if name != "age"]
    clauses = [rng.choice(CLAUSES[name]).format(v=record[name]) for name in told]
    if not clauses:
        return f"This is {subject.rstrip(',')}."
    if rng.random() < 0.6:
        *first, last = clauses
        return f"{subject} {', '.join(first)} and {last}." if first else f"{subject} {last}."
    again = rng.choice((record["name"], "She", "He"))
    return " ".join(f"{again if i else subject} {one}." for i, one in enumerate(clauses))


def _schema(rng: Random, held_out: bool) -> Exercise:
    record = json.loads(draw(person, rng, held_out))
    told = rng.sample(list(CLAUSES), rng.randint(1, 3))
    asked = rng.sample(["name", *told], rng.randint(2, len(told) + 1))
    if rng.random() < 0.5:
        asked.sort(key=list(record).index)
    ask = rng.choice(SCHEMA_ASKS)
    prompt = ask.format(t=_described(rng, record, told), f=_listed(rng, asked))
    return Exercise("schema", prompt, as_json({name: record[name] for name in asked}))


_MAKERS: dict[str, Callable[[Random, bool], Exercise]] = {
    "sum": _sum,
    "reverse": _reverse,
    "sort": _sort,
    "count": _count,
    "recall": _recall,
    "schema": _schema,
}


def exercise(kind: str, rng: Random, *, held_out: bool) -> Exercise:
    """One exercise of the kind, drawn from its held-out tenth or from the rest."""
    return _MAKERS[kind](rng, held_out)


def exercises(kind: str, n: int, seed: int, held_out: bool = True) -> list[Exercise]:
    """n exercises of the kind; the same arguments give the same exercises."""
    rng = Random(f"{kind} {seed}")
    return [exercise(kind, rng, held_out=held_out) for _ in range(n)]
