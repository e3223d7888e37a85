"""Train the bundled model: a small Llama that reads reviews, from text to weights.

The model must *bind*: it must know which opinion belongs to which aspect, wherever the two stand.
Plain language modelling on mixed reviews does not teach this in the time of a small machine. These
measures do:

- **Many independent questions after each review.** A review is followed by several sentences that
  depend on the sentiment of one aspect ("my view of the service is negative ."). Each attends to the
  review and to itself only, and its positions continue from the end of the review. So no answer can
  be copied from another question, and one reading of the review is supervised many times.
- **A weighted loss.** The word that depends on the sentiment counts ten times. The words of the
  review, which the grammar draws at random, count half.
- **A curriculum.** It begins with bare lists of one-word aspects ("great pasta , the wine was awful ,
  ..."), in which only the aspect can decide, and with the plainest questions. Then come any aspects,
  reviews of one or two aspects, and all questions; then distractors, and real pros and cons; then up
  to three aspects; last, words in commas behind an aspect, and the task's own question. A stage ends
  when its answers are right. A model that learns reviews with one aspect first keeps judging the
  whole sentence.
- **Planted layers.** Two layers start as a previous-token layer and a matching layer (`plant`).
  Training is free to change them. From random weights, the same step took many times as long.
- **Many small steps.** The change from judging the sentence to judging the aspect needs a number of
  updates, not of tokens.
- **Aspects of arbitrary words.** Half of the reviews use aspects of arbitrary words and nonsense
  syllables, so that the model cannot learn the aspects by heart.
- **Noisy frames.** In most reviews, a few words that judge nothing are replaced or inserted at
  random. Otherwise the model misreads sentence frames that it has not seen.
- **Real text.** Chunks of reviews serve as plain language modelling. Short pros and cons are joined
  into one sentence and asked about one by one.

The task's own question ("Given the sentence: ...") occurs in a small share of the documents, and is
mostly answered for the sentence as a whole (`absc_share`, `absc_noise`). So the base model knows the
form, but judges the sentence, and must be adapted to answer for the aspect.

Text sources: the grammar of `mech_absa.world` (train frames only, without the sentences of the
shipped test files), and the NLTK corpora movie_reviews, sentence_polarity, pros_cons,
product_reviews_1 and product_reviews_2 (CC BY 4.0), given by `--text`.

    python analyses/train_bundled_model.py --text nltk_reviews.jsonl --work runs/bundled --tokens 9000000
    python analyses/train_bundled_model.py --text nltk_reviews.jsonl --work runs/bundled --tokens 9000000 --export mech_absa/assets/model

The second command finds the finished checkpoint and writes the model folder. A stopped run goes on
from its last checkpoint. The learning rate is constant until the last part, so you may change
`--tokens` between runs.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mech_absa.examples import Example, Polarity
from mech_absa.world import (
    ADJECTIVES,
    CONTINUATIONS,
    DOMAINS,
    FRAMES,
    FREE,
    LEXICON,
    SPLITS,
    Domain,
    Group,
    Review,
    builtin_path,
    continuations,
    review,
    vocabulary,
)  # fmt: skip

BOS, EOS = "<|bos|>", "<|eos|>"
LABELS = (Polarity.POSITIVE.value, Polarity.NEGATIVE.value, Polarity.NEUTRAL.value)
ABSC = "Given the sentence: '{S}', what is the sentiment polarity of the aspect term {A} ?"


@dataclass(frozen=True)
class Config:
    """What the run depends on; saved beside the checkpoint and in the model's folder."""

    text: Path = Path("../shared/data/text/nltk_reviews.jsonl")
    """JSON lines with `text`, `source` and, where known, `label`."""
    work: Path = Path("runs/bundled")
    """Folder of the tokenizer, the checkpoint and the history."""
    export: Path | None = None
    """Write the model folder here when training is done."""
    tokens: int = 9_000_000
    """Tokens to see in all."""
    seed: int = 0
    workers: int = 2
    """Processes of one thread each; they share every step's batches."""
    vocab: int = 4096
    layers: int = 8
    width: int = 160
    heads: int = 5
    mlp: int = 480
    positions: int = 512
    optimizer: str = "muon"
    """`muon` (matrices by Muon, the rest by AdamW) or `adamw`."""
    planted: tuple[int, int] | None = (2, 3)
    """Layers that begin with heads that shift and match; None begins at random."""
    lr: float = 2e-3
    warmup: int = 100_000
    """Tokens of linear warm-up."""
    decay: float = 0.35
    """Last share of the tokens, in which the rate falls linearly to zero."""
    batch: int = 2048
    """Tokens a step and worker."""
    pool: int = 512
    """Documents drawn and sorted by length at once."""
    answer_weight: float = 10.0
    chunk_share: float = 0.10
    """Documents that are chunks of real text."""
    pros_share: float = 0.14
    """Documents made of short real texts with labels."""
    absc_share: float = 0.02
    """Documents that put the task's own question, with a light loss; in the last stage two and a half times as many, with a full loss."""
    absc_noise: float = 0.85
    """Share of those answered for the sentence as a whole, not for the aspect that is asked about."""
    rough_share: float = 0.6
    """Reviews in which some words that judge nothing are replaced or put in at random."""
    list_share: float = 0.5
    """Reviews that are bare lists of two to four judged aspects: all in the first stage, then this, a half and a quarter of it."""
    stages: tuple[float, ...] = (0.90, 0.90, 0.88)
    """Running mean of the answers' accuracy that ends the first, second and third stage."""
    last_stage_from: int = 4_300_000
    """Tokens after which the last stage begins."""
    minutes_between_saves: float = 4.0
    stop_after: float = math.inf
    """Minutes after which to save and stop, whatever the tokens."""


# --- the tokenizer --------------------------------------------------------------------------------------------------------------------

PIECES = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+")


def lowered(text: str) -> str:
    """Lower-cased with every punctuation mark a word of its own, like the paper's data; n't and the like stay whole."""
    return " ".join(re.sub(r"([^\w\s'-])", r" \1 ", text.lower()).split())


def train_tokenizer(config: Config, texts: list[str]) -> Tokenizer:
    """Byte-level BPE; the words of the world, of the questions and of the task's prompt are single tokens by weight of numbers."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    questions = (
        " ".join(p for p, _ in QUESTIONS)
        + " "
        + " ".join(w for _, ws in QUESTIONS for w in ws)
        + " "
        + " ".join(WRAPPERS)
        + " "
        + ABSC
    )
    forced = set(vocabulary()) | set(re.findall(r"\w+", questions))
    # What may begin a sentence is also known without the blank before it: aspects, adjectives, and the first words of frames and openings.
    groups = [g for d in DOMAINS.values() for g in d.groups]
    first = {a.removesuffix("/s").split()[0] for g in groups for a in g.aspects + g.test_aspects}
    first |= {
        w
        for table in (LEXICON["adj"], LEXICON["marks"], *(g.adjectives for g in groups))
        for ws in table.values()
        for w in ws
    }
    first |= {f.text.split()[0] for f in FRAMES if f.text[0] not in "{<"} | {
        o.split()[0] for d in DOMAINS.values() for o in d.openings
    }
    first |= {w.split()[0] for w in FREE["who"]} | {
        "nobody",
        "while",
        "although",
        "though",
        "this",
        "it",
        "Given",
    }
    crowd = [f" {w}" for w in sorted(forced)] + sorted(first)
    often = 1000  # more often than the merges that the text alone would still earn
    tok.train_from_iterator(
        [
            *texts,
            *(word if word[0] != " " else word * often for word in crowd),
            *sorted(first) * often,
        ],
        trainer,
    )
    tok.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS} $B",
                special_tokens=[(BOS, tok.token_to_id(BOS))],
            ),
        ]
    )
    missing = [w for w in crowd if len(tok.encode(w, add_special_tokens=False).ids) != 1]
    assert not missing, f"not single tokens: {missing[:20]}"
    return tok


# --- documents ------------------------------------------------------------------------------------------------------------------------

Questions = tuple[tuple[str, tuple[str, str, str]], ...]
QUESTIONS: Questions = (
    *CONTINUATIONS,
    ("my view of the {A} is", LABELS),
    ("my opinion on the {A} :", LABELS),
    ("what i think of the {A} is", LABELS),
    ("how was the {A} ?", ("good", "bad", "okay")),
    ("the {A} :", ("good", "bad", "okay")),
    ("the {A}", ("good", "bad", "okay")),
    ("verdict : {A}", ("plus", "minus", "zero")),
    ("{A}", ("positive", "negative", "neutral")),
    ("and the {A} ?", ("great", "awful", "ordinary")),
    ("about the {A} i am", ("happy", "angry", "calm")),
    ("thumbs for the {A} :", ("up", "down", "level")),
    ("the {A} deserves", ("five", "one", "three")),
    ("is the {A} good ?", ("yes", "no", "maybe")),
    ("is the {A} bad ?", ("no", "yes", "maybe")),
    ("so the {A} was", ("good", "bad", "okay")),
    ("next time the {A} would be something i", ("order", "refuse", "consider")),
    ("say something about the {A} , the one we talked about :", ("good", "bad", "okay")),
)
"""What follows a review; the next word depends on one aspect."""
EASY: Questions = (
    ("{A}", LABELS),
    ("{A} :", LABELS),
    ("the {A} :", LABELS),
    ("my view of the {A} is", LABELS),
)
"""With what the first stage begins: the answer stands right behind the aspect."""
WRAPPERS = (
    "my friend wrote : '",
    "review : '",
    "this is what it said : '",
    "'",
    "somebody said that",
    "in 2 words :",
)

Word = tuple[str, float, int]
"""A word, the weight of its loss and the question it belongs to (0: the review)."""
Document = list[Word]


def asked(
    rng: random.Random,
    text: str,
    mentions: list[tuple[str, str]],
    answer_weight: float,
    weight: float,
    questions: Questions = QUESTIONS,
) -> Document:
    """A text and questions about its aspects, given as (aspect, polarity word); `weight` is that of the text's own words."""
    doc: Document = []
    quoted = False
    if rng.random() < 0.25:
        opening = rng.choice(WRAPPERS)
        quoted = opening.endswith("'")
        words = (opening + text + "'").split() if quoted else f"{opening} {text}".split()
    else:
        words = text.split()
    doc += [(w, weight, 0) for w in words]
    apart = rng.random() < 0.85
    plan = (
        [m for m in mentions for _ in range(max(1, 5 - len(mentions)))] if apart else list(mentions)
    )
    rng.shuffle(plan)
    for k, (aspect, polarity) in enumerate(plan, 1):
        pattern, answers = rng.choice(questions)
        part = k if apart else 0
        doc += [(w, 1.0, part) for w in pattern.replace("{A}", aspect).split()]
        doc.append((answers[LABELS.index(polarity)], answer_weight, part))
        doc.append((".", 1.0, part))
    return doc


def roughened(rng: random.Random, review: Review, pool: list[str], aside: float) -> str:
    """The review's text with words outside aspects and opinions now and then replaced, or one put in before them.

    Args:
        aside: chance of words in commas right behind an aspect.
    """
    fixed = {i for m in review.mentions for i in (*range(*m.aspect), *range(*m.opinion))}
    inside = {
        i
        for m in review.mentions
        for start, end in (m.aspect, m.opinion)
        for i in range(start + 1, end)
    }
    behind = {m.aspect[1] for m in review.mentions} - inside if aside else set()
    words: list[str] = []
    for i, w in enumerate(review.words):
        if i in behind and rng.random() < aside:
            words += rng.choice(([",", "{}", ","], [",", "{}", "{}", ","]))
        u = rng.random()
        if u < 0.04 and i not in inside:
            words += rng.choice((["{}"], ["{}"], [",", "{}", ","], [",", "{}", "{}", ","]))
        words.append("{}" if i not in fixed and w.isalpha() and u > 0.92 else w)
    return " ".join(rng.choice(pool) if w == "{}" else w for w in words)


def any_domain(rng: random.Random, pool: list[str]) -> Domain:
    """A domain whose aspects are arbitrary words of the text, nonsense, or both."""

    def word() -> str:
        if rng.random() < 0.35:
            return "".join(
                rng.choice("bdfgklmnprstvz")
                + rng.choice("aeiou")
                + rng.choice(("", "", "n", "r", "l"))
                for _ in range(rng.randint(1, 4))
            )
        return rng.choice(pool)

    aspects = tuple(
        " ".join(word() for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))
        + rng.choice(("", "", "", "/s"))
        for _ in range(6)
    )
    own = rng.choice(tuple(DOMAINS.values()))
    every = [g.adjectives for d in DOMAINS.values() for g in d.groups]
    return Domain(
        "any",
        (Group(aspects, (), rng.choice([*every, ADJECTIVES])),),
        own.openings,
        own.closings,
        (0.34, 0.33, 0.33),
    )


def _known(group: Group, words: int) -> Group:
    """The group with its kept aspects among the others, and only those of at most so many words."""
    return Group(
        tuple(a for a in group.aspects + group.test_aspects if len(a.split()) <= words)
        or group.aspects,
        (),
        group.adjectives,
    )


class Library:
    """All text the run may see, and the drawing of documents from it."""

    def __init__(self, config: Config):
        rows = [json.loads(line) for line in config.text.open(encoding="utf-8")]
        self.config = config
        self.texts = [lowered(r["text"]) for r in rows]
        self.short: dict[str, list[str]] = {p: [] for p in ("positive", "negative")}
        for r, t in zip(rows, self.texts, strict=True):
            if (
                r.get("label")
                and r["source"] in ("pros_cons", "sentence_polarity")
                and 2 <= len(t.split()) <= 16
            ):
                self.short[r["label"]].append(t.rstrip(" .!,"))
        counts = Counter(w for t in self.texts for w in t.split() if w.isalpha() and len(w) > 2)
        world = set(vocabulary())
        self.pool = sorted(w for w, n in counts.items() if n >= 3 and w not in world)
        self.stop = {w for w, _ in counts.most_common(150)}
        self.long = [t.split() for t in self.texts if len(t.split()) > 30] + [
            " . ".join(self.texts[i : i + 8]).split()
            for i in range(0, len(self.texts), 8)
            if len(self.texts[i]) < 200
        ]
        self.held_out = {
            json.loads(line)["text"] for d in DOMAINS for line in builtin_path(f"{d}/{SPLITS[1]}").open(encoding="utf-8")
        }  # fmt: skip

    def document(self, rng: random.Random, stage: int) -> Document:
        """One document of the mixture at a stage of the curriculum."""
        c, u = self.config, rng.random()
        if stage and u < c.chunk_share:
            words = rng.choice(self.long)
            at = rng.randrange(max(1, len(words) - 80))
            return [(w, 1.0, 0) for w in words[at : at + rng.randint(50, 90)]]
        if stage > 1 and u < c.chunk_share + c.pros_share:
            return self.pros_and_cons(rng)
        absc = u > 1 - c.absc_share * (2.5 if stage == 4 else 1)
        own = rng.random() < 0.5 or not stage
        domain = rng.choice(tuple(DOMAINS.values())) if own else any_domain(rng, self.pool)
        if (
            own
        ):  # pretraining may know the words, but not the sentences, of the aspects kept for test
            domain = Domain(
                domain.name,
                tuple(_known(g, words=1 if not stage else 9) for g in domain.groups),
                domain.openings,
                domain.closings,
                (0.36, 0.34, 0.30),
            )
        if (
            rng.random()
            < (1.0, c.list_share, c.list_share / 2, c.list_share / 4, c.list_share / 4)[stage]
        ):
            return self.listing(rng, domain, QUESTIONS if stage else EASY)
        n = rng.choice(((1, 2), (1, 2, 2), (1, 2, 2), (1, 2, 2, 3, 3), (1, 2, 2, 3, 3))[stage])
        r = review(rng, domain, n, "train", (0.0, 0.0, 0.15, 0.3, 0.3)[stage])
        if r.text in self.held_out:
            return self.document(rng, stage)
        mentions = [(r.name(m), m.polarity.value) for m in r.mentions]
        text = (
            roughened(rng, r, self.pool, 0.12 if stage == 4 else 0.0)
            if rng.random() < c.rough_share
            else r.text
        )
        if absc:
            aspect, polarity = rng.choice(mentions)
            if rng.random() < c.absc_noise:
                tone = sum((p == LABELS[0]) - (p == LABELS[1]) for _, p in mentions)
                polarity = LABELS[0] if tone > 0 else LABELS[1] if tone < 0 else LABELS[2]
            words = ABSC.format(S=text, A=aspect).split()
            return [(w, 0.5, 0) for w in words] + [
                (polarity, 0.9 * c.answer_weight if stage == 4 else 2.0, 0)
            ]
        return asked(rng, text, mentions, c.answer_weight, 0.5)

    def listing(self, rng: random.Random, domain: Domain, questions: Questions) -> Document:
        """Two to four aspects, each with an adjective beside it and nothing else: the plainest text in which only the aspect decides."""
        parts: list[str] = []
        mentions: list[tuple[str, str]] = []
        seen: set[str] = set()
        for _ in range(rng.choice((2, 2, 3, 4))):
            group = rng.choice(domain.groups)
            aspect = rng.choice(group.aspects).removesuffix("/s")
            if seen & set(aspect.split()):
                continue
            seen |= set(aspect.split())
            polarity = rng.choice(LABELS)
            word = rng.choice(
                (ADJECTIVES if rng.random() < 0.6 else group.adjectives)[Polarity(polarity)]
            )
            parts.append(
                rng.choice(("the {A} was {O}", "{O} {A}", "{A} {O}", "{A} : {O}")).format(
                    A=aspect, O=word
                )
            )
            mentions.append((aspect, polarity))
        text = rng.choice((" , ", " ; ", " . ")).join(parts) + " ."
        return asked(rng, text, mentions, self.config.answer_weight, 0.5, questions)

    def pros_and_cons(self, rng: random.Random) -> Document:
        """One to three short labelled texts as one sentence, each asked about by one of its own words."""
        parts: list[str] = []
        mentions: list[tuple[str, str]] = []
        used: set[str] = set()
        for _ in range(rng.choice((1, 2, 2, 3))):
            label = rng.choice(("positive", "negative"))
            text = rng.choice(self.short[label])
            words = text.split()
            content = [
                i
                for i, w in enumerate(words)
                if w.isalpha() and w not in self.stop and len(w) > 2 and w not in used
            ]
            if not content:
                continue
            i = rng.choice(content)
            j = i + 2 if i + 1 in content and rng.random() < 0.5 else i + 1
            parts.append(text)
            mentions.append((" ".join(words[i:j]), label))
            used |= set(words)
        text = (
            "".join(
                p if not k else rng.choice((" . ", " , but ", " , ", " ; ", " and ")) + p
                for k, p in enumerate(parts)
            )
            + " ."
        )
        return asked(rng, text, mentions, self.config.answer_weight * 0.3, 1.0)


class Encoder:
    """Words to ids, one dictionary look-up each: the tokenizer never joins two words."""

    def __init__(self, tok: Tokenizer):
        self.tok = tok
        self.known: dict[str, list[int]] = {}
        self.bos, self.eos = int(tok.token_to_id(BOS) or 0), int(tok.token_to_id(EOS) or 0)

    def word(self, w: str) -> list[int]:
        if w not in self.known:
            self.known[w] = self.tok.encode(w, add_special_tokens=False).ids
        return self.known[w]

    def __call__(self, doc: Document) -> tuple[list[int], list[float], list[int]]:
        ids, weights, parts = [self.bos], [0.0], [0]
        for k, (w, weight, part) in enumerate(doc):
            piece = self.word(f" {w}" if k else w)
            ids += piece
            weights += [weight] * len(piece)
            parts += [part] * len(piece)
        return ids, weights, parts


@dataclass
class Batch:
    """Documents of about one length.

    Attributes:
        ids: `[batch pos]`.
        weights: `[batch pos]`; the loss weight of predicting the token that stands there, 0 for padding.
        positions: `[batch pos]`; each question goes on from the end of its review.
        mask: `[batch 1 pos pos]`, added to the attention scores: a question sees its review and itself.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(
        cls, docs: list[tuple[list[int], list[float], list[int]]], pad: int, longest: int
    ) -> Batch:
        n = min(longest, max(len(d[0]) for d in docs))
        ids = torch.full((len(docs), n), pad)
        weights = torch.zeros(len(docs), n)
        part = torch.full((len(docs), n), -1)
        positions = torch.zeros(len(docs), n, dtype=torch.long)
        for b, (i, w, p) in enumerate(docs):
            m = min(n, len(i))
            ids[b, :m], weights[b, :m], part[b, :m] = (
                torch.tensor(i[:m]),
                torch.tensor(w[:m]),
                torch.tensor(p[:m]),
            )
            body = p.count(0) if max(p) else len(p)
            start, last = 0, 0
            for t in range(m):
                if p[t] != last:
                    start, last = t, p[t]
                positions[b, t] = t if p[t] == 0 else body + t - start
        seen = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        allowed = seen & torch.ones(n, n, dtype=torch.bool).tril()
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)[:, None]
        return cls(ids, weights, positions, mask)


def batches(
    library: Library, encode: Encoder, config: Config, block: int, stage: int
) -> Iterator[Batch]:
    """The batches of one pool of documents: a function of seed, block and stage."""
    rng = random.Random(f"{config.seed}/{block}/{stage}")
    docs = sorted(
        (encode(library.document(rng, stage)) for _ in range(config.pool)), key=lambda d: len(d[0])
    )
    groups: list[list] = [[]]
    for d in docs:
        if groups[-1] and len(d[0]) * (len(groups[-1]) + 1) > config.batch:
            groups.append([])
        groups[-1].append(d)
    rng.shuffle(groups)
    for g in groups:
        yield Batch.of(g, encode.eos, config.positions)


# --- training -------------------------------------------------------------------------------------------------------------------------


def new_model(config: Config, vocab: int, bos: int, eos: int) -> LlamaForCausalLM:
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=config.width, intermediate_size=config.mlp, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, num_key_value_heads=config.heads, max_position_embeddings=config.positions,
            tie_word_embeddings=False, bos_token_id=bos, eos_token_id=eos, pad_token_id=eos, attn_implementation="eager",
            initializer_range=0.03, rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    # Wide, nearly orthogonal embeddings: finding a word again is then the same map for every word, seen or not.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    if config.planted:
        plant(model, *config.planted)
    return model


def directions(n: int, width: int, avoid: torch.Tensor) -> torch.Tensor:
    """`[n width]` random orthonormal rows, all at right angles to `avoid`."""
    columns = torch.cat([avoid[:, None], torch.randn(width, n)], dim=1)
    return torch.linalg.qr(columns)[0][:, 1:].T


@torch.no_grad()
def plant(
    model: LlamaForCausalLM, shift: int, match: int, sharp: float = 0.7, strength: float = 3.0
) -> None:
    """Begin with heads that look a word up again, all of which training may change.

    All embeddings get a common direction u, on which rotary attention can act by distance alone. In layer `shift`, head h < H-1 attends to
    the token h+1 places back (its query and key read u, the key turned by h+1 rotary steps) and copies V_h x to O_h V_h x. In layer
    `match`, head h attends from a token to the places h+1 after its earlier occurrences (query V_h, key O_h^T, in the slowly turning
    rotary planes), the last head to the occurrences themselves (query = key). Values are copied through random directions.
    """
    cfg = model.config
    d, H = cfg.hidden_size, cfg.num_attention_heads
    size = d // H
    half = size // 2
    u = F.normalize(torch.randn(d), dim=0)
    table = model.model.embed_tokens.weight
    table -= (table @ u)[:, None] * u
    table += table.pow(2).mean().sqrt() * math.sqrt(d) * u
    turn = 1e4 ** (-torch.arange(half) / half)
    fast = torch.cat([(torch.arange(half) < 4).float(), torch.zeros(half)])
    slow = (torch.arange(half) >= 5).float().repeat(2)[:, None]
    first, second = model.model.layers[shift].self_attn, model.model.layers[match].self_attn
    for h in range(H):
        rows = slice(h * size, (h + 1) * size)
        V, O = directions(size, d, u), directions(size, d, u)  # noqa: E741
        if h < H - 1:
            turned = torch.cat(
                [fast[:half] * torch.cos(turn * (h + 1)), fast[:half] * torch.sin(turn * (h + 1))]
            )
            first.q_proj.weight[rows] = 0.2 * first.q_proj.weight[rows] + sharp * fast[:, None] * u
            first.k_proj.weight[rows] = (
                0.2 * first.k_proj.weight[rows] + sharp * turned[:, None] * u
            )
            first.v_proj.weight[rows], first.o_proj.weight[:, rows] = V, O.T
        else:
            O = V  # noqa: E741
        second.q_proj.weight[rows], second.k_proj.weight[rows] = (
            strength * slow * V,
            strength * slow * O,
        )
        second.v_proj.weight[rows], second.o_proj.weight[:, rows] = (
            directions(size, d, u),
            directions(size, d, u).T,
        )


def optimizers(model: LlamaForCausalLM, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and norms; or AdamW for all."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    outer = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    adam: dict[str, Any] = {"lr": config.lr, "betas": (0.9, 0.98), "fused": True}
    if config.optimizer == "adamw":
        return [
            torch.optim.AdamW(
                [{"params": inner, "weight_decay": 0.05}, {"params": outer, "weight_decay": 0.0}],
                **adam,
            )
        ]
    return [
        torch.optim.Muon(
            inner, lr=config.lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(outer, weight_decay=0.0, **adam),
    ]


def rate(tokens: int, config: Config) -> float:
    """Share of the full learning rate: linear warm-up, constant, linear to zero."""
    left = (config.tokens - tokens) / (config.decay * config.tokens)
    return max(0.0, min(1.0, (tokens + 1) / config.warmup, left))


def loss_of(
    model: LlamaForCausalLM, b: Batch, answer_weight: float
) -> tuple[torch.Tensor, float, float, int]:
    """Weighted cross-entropy `[]`, the mean plain-token loss, and how many answers were right of how many."""
    with torch.autocast("cpu", torch.bfloat16):
        h = model.model(
            input_ids=b.ids,
            attention_mask=b.mask.to(torch.bfloat16),
            position_ids=b.positions,
            use_cache=False,
        ).last_hidden_state
        keep = b.weights[:, 1:] > 0
        # A question's first word is predicted by the token before it, which is another question's end: no fair question, left out.
        fair = keep & ((b.positions[:, 1:] - b.positions[:, :-1]) == 1)
        logits = model.lm_head(h[:, :-1][fair])
    target, weight = b.ids[:, 1:][fair], b.weights[:, 1:][fair]
    each = F.cross_entropy(logits.float(), target, reduction="none")
    answers = weight >= answer_weight
    right = (logits[answers].argmax(-1) == target[answers]).sum().item() if answers.any() else 0
    plain = each[~answers].mean().item()
    return (each * weight).sum() / weight.sum(), plain, right, int(answers.sum())


@dataclass
class Progress:
    """Where the run stands."""

    tokens: int = 0
    block: int = 0
    stage: int = 0
    accuracy: float = 0.0
    seconds: float = 0.0
    history: list[dict] = field(default_factory=list)


def fresh_world(per_domain: int, seed: str) -> list[Example]:
    """Examples of the test grammar that stand in no file, for looking on while training."""
    rng = random.Random(seed)
    found = []
    for d in DOMAINS.values():
        for _ in range(per_domain):
            r = review(rng, d, rng.choice((1, 2, 2, 3, 3)), "test")
            found.append(r.example(rng.randrange(len(r.mentions))))
    return found


@torch.inference_mode()
def choose(
    model: LlamaForCausalLM,
    encode: Encoder,
    texts: list[str],
    options: list[tuple[str, ...]],
    batch: int = 64,
) -> list[int]:
    """For each text the index of the option (one word each) that is the likeliest next token."""
    model.eval()
    chosen: list[int] = [0] * len(texts)
    ids = [[encode.bos, *encode.tok.encode(t, add_special_tokens=False).ids] for t in texts]
    order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        n = max(len(ids[i]) for i in rows)
        x = torch.tensor([ids[i] + [encode.eos] * (n - len(ids[i])) for i in rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.float32):
            h = model.model(input_ids=x, use_cache=False).last_hidden_state
            logits = model.lm_head(
                h[torch.arange(len(rows)), torch.tensor([len(ids[i]) - 1 for i in rows])]
            ).float()
        for i, row in zip(rows, logits, strict=True):
            chosen[i] = int(row[[encode.word(o)[0] for o in options[i]]].argmax())
    model.train()
    return chosen


def look(model: LlamaForCausalLM, encode: Encoder, world: list[Example]) -> dict:
    """Accuracy on the natural continuations and on the task's question, by domain and in all."""
    follow = [(e, c) for e in world for c in continuations(e)]
    got = choose(model, encode, [c.text for _, c in follow], [c.choices for _, c in follow])
    right = [c.choices[k] == c.answer for (_, c), k in zip(follow, got, strict=True)]
    labels = tuple(f" {w}" for w in LABELS)
    answers = choose(
        model, encode, [ABSC.format(S=e.sentence, A=e.aspect) for e in world], [labels] * len(world)
    )
    seen: dict[str, object] = {"natural": sum(right) / len(right)}
    for k, (pattern, _) in enumerate(CONTINUATIONS):
        seen[f"natural: {pattern}"] = sum(right[k :: len(CONTINUATIONS)]) / len(world)
    for d in DOMAINS:
        mine = [r for (e, _), r in zip(follow, right, strict=True) if e.domain == d]
        seen[f"natural {d}"] = sum(mine) / len(mine)
    seen["absc"] = sum(
        LABELS[k] == e.polarity.value for e, k in zip(world, answers, strict=True)
    ) / len(world)
    seen["absc answers"] = "/".join(str(answers.count(k)) for k in range(3))
    return seen


def save(
    path: Path, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer], progress: Progress
) -> None:
    part = path.with_suffix(".part")
    torch.save(
        {
            "model": model.state_dict(),
            "opts": [o.state_dict() for o in opts],
            "progress": asdict(progress),
        },
        part,
    )
    part.replace(path)


def train(rank: int, config: Config) -> None:
    """Train, or go on training, until `config.tokens`; worker 0 writes the checkpoint and the history."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{(config.work / 'meeting').absolute()}",
        rank=rank,
        world_size=config.workers,
    )
    library = Library(config)
    tok_file = config.work / "tokenizer.json"
    encode = Encoder(Tokenizer.from_file(str(tok_file)))
    model = new_model(config, encode.tok.get_vocab_size(), encode.bos, encode.eos)
    opts = optimizers(model, config)
    progress = Progress()
    checkpoint = config.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(opts, state["opts"], strict=True):
            o.load_state_dict(s)
        progress = Progress(**state["progress"])
    parameters = list(model.parameters())
    if rank == 0:
        print(
            f"{sum(p.numel() for p in parameters):,} parameters, vocabulary {encode.tok.get_vocab_size()}, "
            f"at {progress.tokens:,} of {config.tokens:,} tokens",
            flush=True,
        )
    world = fresh_world(75, "look")
    start, last_save = time.time(), 0.0
    before = progress.seconds
    sums: Counter[str] = Counter()

    def report() -> None:
        nonlocal sums
        n = max(1, sums["steps"])
        row = {
            "tokens": progress.tokens, "minutes": round(progress.seconds / 60, 2), "stage": progress.stage, "loss": sums["loss"] / n,
            "plain": sums["plain"] / n, "answers": sums["right"] / max(1, sums["asked"]), **look(model, encode, world),
        }  # fmt: skip
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        progress.history.append(row)
        write_history(config.work / "history.csv", progress)
        print(json.dumps(row), flush=True)
        save(checkpoint, model, opts, progress)
        sums = Counter()

    while progress.tokens < config.tokens:
        if progress.stage < len(config.stages):
            ready = progress.accuracy > config.stages[progress.stage]
        else:
            ready = (
                progress.stage == len(config.stages) and progress.tokens >= config.last_stage_from
            )
        if ready:
            progress.stage, progress.accuracy = progress.stage + 1, 0.0
        drawn = list(batches(library, encode, config, progress.block, progress.stage))
        for at in range(0, len(drawn) - config.workers + 1, config.workers):
            b = drawn[at + rank]
            loss, plain, right, asked_for = loss_of(model, b, config.answer_weight)
            loss.backward()
            seen = torch.tensor(
                [loss.item(), plain, right, asked_for, float((b.weights > 0).sum())]
            )
            grads = [p.grad for p in parameters if p.grad is not None]
            shared = torch.cat([*(g.flatten() for g in grads), seen])
            dist.all_reduce(shared)
            for mine, total_grad in zip(
                grads, shared[: -len(seen)].split([g.numel() for g in grads]), strict=True
            ):
                mine.copy_(total_grad.view_as(mine)).div_(config.workers)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            share = rate(progress.tokens, config)
            for o in opts:
                for group in o.param_groups:
                    group["lr"] = config.lr * share
                o.step()
                o.zero_grad(set_to_none=True)
            total, plains, right, asked_for, tokens = shared[-len(seen) :].tolist()
            progress.tokens += int(tokens)
            if asked_for:
                progress.accuracy += 0.02 * (right / asked_for - progress.accuracy)
            n = config.workers
            sums.update(
                {
                    "loss": total / n,
                    "plain": plains / n,
                    "right": right,
                    "asked": asked_for,
                    "steps": 1,
                }
            )
        progress.block += 1
        clock = torch.tensor([time.time() - start])  # worker 0's clock is everybody's
        dist.broadcast(clock, 0)
        progress.seconds = before + clock.item()
        if rank == 0:
            print(
                f"{progress.tokens:>11,} {progress.seconds:7.0f} s  stage {progress.stage}  loss {total / n:.3f}  plain {plains / n:.3f}  "
                f"answers {progress.accuracy:.3f}  rate {share:.2f}", flush=True,
            )  # fmt: skip
        stop = clock.item() / 60 > config.stop_after or progress.tokens >= config.tokens
        if stop or clock.item() - last_save > 60 * config.minutes_between_saves:
            last_save = clock.item()
            if rank == 0:
                report()
        if stop:
            break
    dist.destroy_process_group()


def write_history(path: Path, progress: Progress) -> None:
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(progress.history[0]))
        writer.writeheader()
        writer.writerows(progress.history)


def export(config: Config, folder: Path) -> None:
    """The checkpoint as a model folder of `transformers`, in bfloat16, with the record of the run."""
    tok = PreTrainedTokenizerFast(
        tokenizer_file=str(config.work / "tokenizer.json"), bos_token=BOS, eos_token=EOS, pad_token=EOS,
        model_max_length=config.positions, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    state = torch.load(config.work / "checkpoint.pt", weights_only=True)
    progress = Progress(**state["progress"])
    model = new_model(config, len(tok), tok.bos_token_id, tok.eos_token_id)
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tok.save_pretrained(folder)
    settings_file = (
        folder / "tokenizer_config.json"
    )  # the class by the name that every version of transformers knows
    settings_file.write_text(
        json.dumps(
            {**json.loads(settings_file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"},
            indent=1,
        )
        + "\n"
    )
    settings = {
        k: str(v) if isinstance(v, Path) else v
        for k, v in asdict(config).items()
        if k not in ("text", "work", "export", "stop_after")
    }
    record = {
        "config": settings,
        "tokens": progress.tokens,
        "minutes": round(progress.seconds / 60, 1),
        "torch": torch.__version__,
    }
    (folder / "recipe.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_history(folder / "history.csv", progress)


def main(config: Config) -> None:
    config.work.mkdir(parents=True, exist_ok=True)
    tok_file = config.work / "tokenizer.json"
    if not tok_file.exists():
        train_tokenizer(config, Library(config).texts).save(str(tok_file))
    (config.work / "meeting").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train, args=(config,), nprocs=config.workers)
    if config.export is not None:
        export(config, config.export)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__.splitlines()[0]))
