"""Read SemEval XML, both families.

2014, and MAMS, whose files have the same shape:

    <sentences><sentence id="81"><text>...</text>
        <aspectTerms><aspectTerm term="food" polarity="positive" from="4" to="8"/>...

2015 and 2016 (subtask 1, slots 1 to 3):

    <Reviews><Review><sentences><sentence id="1:0"><text>...</text><Opinions>
        <Opinion target="pizza" category="FOOD#QUALITY" polarity="positive" from="11" to="16"/>...

An opinion whose target is NULL, or that names only a category, has no words in the sentence. It is
left out and counted as `no aspect term`. With `null_targets="category"` the question names the
words of its category instead (`SERVICE#GENERAL` as "service", `FOOD#STYLE_OPTIONS` as "food style
options"), without a span. Every opinion is one example. If two categories of one target differ in
polarity, `examples.duplicates` finds them.

The aspect categories of 2014 (`<aspectCategory category="food" .../>`) and the opinions on whole
reviews of 2016 (subtask 2: `<Opinions>` beside `<sentences>`) are treated in the same way and
counted as `aspect category` and `opinion on a whole text`. The text of the latter is the whole
review.

Files are read with defusedxml: a file that declares entities is rejected, and entities are never
expanded. Line numbers are those of the elements in the file.
"""

from __future__ import annotations

import xml.sax
import xml.sax.handler
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder

import defusedxml.sax
from defusedxml.common import DefusedXmlException, EntitiesForbidden

from ..errors import DataError
from ..examples import Span
from .rows import NULL, Reading, shortened, whole


def read(data: bytes, reading: Reading) -> None:
    """Add the aspect terms, or the opinion targets, of every sentence; ids are
    `stem:sentence.term`, both counted from 1.
    """
    tree = _Tree()
    try:
        defusedxml.sax.parseString(data, tree)
    except DefusedXmlException as e:
        what = (
            f"declares the entity {e.name!r}"
            if isinstance(e, EntitiesForbidden)
            else "refers to a file outside itself"
        )
        problem = f"the XML {what}; entities can expand without bound and read other files, so only XML without them is accepted"
        raise DataError(problem, reading.source, tree.line) from None
    except xml.sax.SAXParseException as e:
        raise DataError(
            f"broken XML: {e.getMessage()}", reading.source, e.getLineNumber()
        ) from None
    except (LookupError, ValueError) as e:
        # ValueError: Python has the encoding, but expat cannot read XML in it.
        problem = f"broken XML: {shortened(str(e), 200)}; UTF-8 is accepted"
        raise DataError(problem, reading.source, tree.line if tree.lines else 1) from None

    root = tree.close()
    sentences = list(root.iter("sentence"))
    if not sentences:
        raise DataError(
            f"the XML begins with <{shortened(root.tag)}> and holds no <sentence>; accepted: SemEval 2014 (<sentences>) and 2015/16 (<Reviews>)",
            reading.source, tree.lines[root],
        )  # fmt: skip
    for n, sentence in enumerate(sentences, 1):
        asked = [*sentence.iter("aspectTerm"), *sentence.iter("Opinion")]
        categories = list(sentence.iter("aspectCategory"))
        if not asked and not categories and not tree.whole:
            reading.left_out["sentence without aspects"] += 1
        for k, element in enumerate([*asked, *categories], 1):
            with reading.at(tree.lines[element]):
                _add(sentence, element, tree.lines[element], f"{reading.stem}:{n}.{k}", reading)
    for n, (text, element) in enumerate(_on_whole_texts(root), 1):
        with reading.at(tree.lines[element]):
            line, id = tree.lines[element], f"{reading.stem}:text.{n}"
            category, label = (_attribute(element, a) for a in ("category", "polarity"))
            reading.add_null_target(text, category, label, line, id, "opinion on a whole text")


def _add(sentence: Element, element: Element, line: int, id: str, reading: Reading) -> None:
    text = sentence.findtext("text")
    if not text:
        raise DataError(
            "the sentence has no <text>, or an empty one; SemEval puts it before the aspects"
        )
    label = _attribute(element, "polarity")
    if element.tag == "aspectCategory":
        category = _attribute(element, "category")
        reading.add_null_target(text, category, label, line, id, "aspect category")
        return
    if element.tag == "aspectTerm":
        term = _attribute(element, "term")
    elif (term := element.get("target", NULL)) == NULL:
        reading.add_null_target(text, _attribute(element, "category"), label, line, id)
        return
    span = (whole(_attribute(element, "from"), "from"), whole(_attribute(element, "to"), "to"))
    reading.add(text, _as_in(text, span, term), label, span, line, id=id)


def _on_whole_texts(root: Element) -> list[tuple[str, Element]]:
    """Return the opinions on whole reviews, each with the sentences of its review as one text."""
    pairs = []
    for review in root.iter("Review"):
        text = " ".join(t for s in review.iter("sentence") if (t := s.findtext("text")))
        pairs += [(text, o) for opinions in review.findall("Opinions") for o in opinions]
    return pairs


def _attribute(element: Element, name: str) -> str:
    if (value := element.get(name)) is None:
        came = ", ".join(element.keys()) or "no attribute at all"
        raise DataError(f"<{element.tag}> has no attribute {name!r}; there are: {came}")
    return value


def _as_in(text: str, span: Span, term: str) -> str:
    """Return `term` with the blanks of the text. XML turns line ends and tabs into spaces in
    attributes, but not in texts.
    """
    found = text[slice(*span)] if 0 <= span[0] <= span[1] else ""
    return found if found.split() == term.split() and len(found) == len(term) else term


class _Tree(xml.sax.handler.ContentHandler):
    """Build elements as ElementTree does, and keep the line on which each begins.

    Attributes:
        lines: element -> its line.
        whole: whether an opinion stands outside every sentence.
    """

    _locator: Any  # set by the parser before the first element

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[Element, int] = {}
        self.whole = False
        self._in_sentence = False
        self._builder = TreeBuilder()

    @property
    def line(self) -> int:
        return self._locator.getLineNumber() or 1

    def startElement(self, name: str, attrs: Any) -> None:
        # Sentences inside sentences would be read once per level, which grows with its square.
        if name == "sentence" and self._in_sentence:
            problem = "a <sentence> stands inside another <sentence>"
            raise xml.sax.SAXParseException(problem, None, self._locator)
        self._in_sentence |= name == "sentence"
        self.whole |= name == "Opinion" and not self._in_sentence
        self.lines[self._builder.start(name, dict(attrs))] = self.line

    def endElement(self, name: str) -> None:
        self._in_sentence &= name != "sentence"
        self._builder.end(name)

    def characters(self, content: str) -> None:
        self._builder.data(content)

    def skippedEntity(self, name: str) -> None:
        # Expat passes over an entity that an unread DTD may declare. The text would silently lose
        # it, and offsets would shift.
        problem = f"the entity {shortened(name)!r} is not known"
        raise xml.sax.SAXParseException(problem, None, self._locator)

    def close(self) -> Element:
        return self._builder.close()
