"""Notebook 01: pictures of text cut into tokens, and a panel in which one types and sees them.

What it is not: a tokenizer. The functions take (id, bytes) pairs or a tokenizer with `encode` and `vocab`.
"""

from __future__ import annotations

import html
import unicodedata
from collections import deque
from collections.abc import Mapping, Sequence

import ipywidgets
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rwkv_nb.teaching import plots
from rwkv_nb.teaching.widgets import Panel

PALE = ("#cfe3f5", "#fbdcc4", "#cdeee0", "#f4dcea", "#f9e6b8")  # black text on each: contrast above 12 to 1
VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}

# Universal Declaration of Human Rights, article 1 (United Nations, 1948; free to quote).
ARTICLE_1 = {
    "English": "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
               "conscience and should act towards one another in a spirit of brotherhood.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen "
              "begabt und sollen einander im Geiste der Brüderlichkeit begegnen.",
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
              "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
               "conciencia, deben comportarse fraternalmente los unos con los otros.",
    "Swahili": "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa. Wote wamejaliwa akili na dhamiri, hivyo yapasa "
               "watendeane kindugu.",
    "Turkish": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve "
               "birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью "
               "и должны поступать в отношении друг друга в духе братства.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι "
             "με λογική και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης.",
    "Arabic": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم بعضا "
              "بروح الإخاء.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के "
             "मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त "
             "है। उन्हें बुद्धि और अन्तरात्मा की देन "
             "प्राप्त है और परस्पर उन्हें भाईचारे के "
             "भाव से बर्ताव करना चाहिए।",
    "Chinese": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。"
                "人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 "
              "부여받았으며 서로 형제애의 정신으로 행동하여야 한다.",
}


def readable(entry: bytes) -> str:
    """A token's bytes for the eye: text where they are text (spaces made visible), else hexadecimal."""
    try:
        text = entry.decode("utf-8")
    except UnicodeDecodeError:
        return " ".join(f"{byte:02X}" for byte in entry)
    return "".join(VISIBLE.get(char, char if char.isprintable() else f"\\x{ord(char):02x}") for char in text)


def pairs(tokenizer, text: str) -> list[tuple[int, bytes]]:
    """(id, bytes) of every token of `text`."""
    return [(token, tokenizer.vocab[token]) for token in tokenizer.encode(text)]


def tokens_html(tokens: Sequence[tuple[int, bytes]]) -> str:
    """Tokens as boxes in changing shades, each with its text, id and bytes; no script, no ids, nothing unescaped."""
    boxes = []
    for position, (token, entry) in enumerate(tokens):
        hexadecimal = " ".join(f"{byte:02X}" for byte in entry)
        boxes.append(
            f'<span style="display:inline-block;margin:1px;padding:2px 4px;border:1px solid #555;border-radius:3px;'
            f'color:#000;background:{PALE[position % len(PALE)]};text-align:center" title="{hexadecimal}">'
            f'<b style="font-family:monospace">{html.escape(readable(entry))}</b><br><small>{token}</small><br>'
            f'<small style="font-family:monospace">{hexadecimal if len(entry) <= 8 else f"{len(entry)} bytes"}</small>'
            "</span>")
    return "<div>" + "".join(boxes) + "</div>"


def show_tokens(tokens: Sequence[tuple[int, bytes]]) -> HTML:
    """`tokens_html` as a cell's result."""
    return HTML(tokens_html(tokens))


def summary(text: str, n_tokens: int) -> str:
    """One line: characters, bytes, tokens, and bytes per token."""
    n_bytes = len(text.encode("utf-8"))
    ratio = f", {n_bytes / n_tokens:.2f} bytes per token" if n_tokens else ""
    return f"{len(text)} characters, {n_bytes} bytes, {_count(n_tokens)}{ratio}"


def _count(n_tokens: int) -> str:
    return "1 token" if n_tokens == 1 else f"{n_tokens} tokens"


class TokenPanel(Panel):
    """Type in the box, see the tokens below. `limit`: characters shown, so that a pasted book stays usable."""

    def __init__(self, tokenizer, text: str = "", limit: int = 2000):
        self.tokenizer, self.limit = tokenizer, limit
        self.box = ipywidgets.Textarea(value=text, description="Your text", rows=3,
                                       layout=ipywidgets.Layout(width="95%"))
        self.line, self.tokens = ipywidgets.HTML(), ipywidgets.HTML()
        super().__init__("tokens of your text", [self.box, self.line, self.tokens])
        self.box.observe(self.guard(self.refresh), names="value")
        self.refresh()

    def refresh(self, *_) -> None:
        """Show the tokens of what is in the box."""
        text = self.box.value[:self.limit]
        tokens = pairs(self.tokenizer, text)
        cut = f" (the first {self.limit} characters)" if len(self.box.value) > self.limit else ""
        self.line.value = html.escape(summary(text, len(tokens)) + cut)
        self.tokens.value = tokens_html(tokens)


def fewest_tokens_split(data: bytes, vocabulary: Mapping[bytes, int]) -> list[bytes]:
    """One of the shortest ways to cut `data` into entries, by breadth-first search over positions.

    Raises ValueError if there is none (cannot happen if every single byte is an entry).
    """
    longest = max(map(len, vocabulary))
    came_from, queue = {0: 0}, deque([0])
    while queue and len(data) not in came_from:
        start = queue.popleft()
        for end in range(min(start + longest, len(data)), start, -1):
            if end not in came_from and data[start:end] in vocabulary:
                came_from[end] = start
                queue.append(end)
    if len(data) not in came_from:
        raise ValueError(f"data: {data!r} cannot be cut into entries of this vocabulary; add its single bytes")
    pieces, end = [], len(data)
    while end:
        pieces.append(data[came_from[end]:end])
        end = came_from[end]
    return pieces[::-1]


def script(entry: bytes) -> str:
    """The writing system of an entry's letters, from their Unicode names; "not UTF-8", "no letters", "several"."""
    try:
        letters = [char for char in entry.decode("utf-8") if char.isalpha()]
    except UnicodeDecodeError:
        return "not UTF-8"
    names = {unicodedata.name(char, "unnamed").split()[0].capitalize() for char in letters}
    if not names:
        return "no letters"
    return names.pop().replace("Cjk", "CJK") if len(names) == 1 else "several"


def _box(ax, x: float, y: float, width: float, label: str, colour: str, size: float = 9) -> None:
    ax.add_patch(Rectangle((x + 0.03, y), width - 0.06, 0.8, facecolor=colour, edgecolor="#555555"))
    ax.text(x + width / 2, y + 0.4, label, ha="center", va="center", fontsize=size, color="black", family="monospace")


def _bare(ax, labels: Sequence[str]) -> None:
    ax.set_yticks([len(labels) - 1 - row + 0.4 for row in range(len(labels))], labels)
    ax.set_xticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def draw_layers(text: str, tokens: Sequence[tuple[int, bytes]]) -> Figure:
    """Characters, bytes, tokens and ids of a short text on four rows, aligned by byte."""
    data = text.encode("utf-8")
    fig, ax = plots.figure(width=max(4.0, 0.42 * len(data)), height=2.3)
    x = 0
    for char in text:
        width = len(char.encode("utf-8"))
        _box(ax, x, 3, width, VISIBLE.get(char, char), "white")
        x += width
    for x, byte in enumerate(data):
        _box(ax, x, 2, 1, f"{byte:02X}", "#eeeeee", 8)
    x = 0
    for position, (token, entry) in enumerate(tokens):
        colour = PALE[position % len(PALE)]
        _box(ax, x, 1, len(entry), readable(entry), colour)
        _box(ax, x, 0, len(entry), str(token), colour, 9 if len(entry) > 1 else 7)
        x += len(entry)
    ax.set(xlim=(0, len(data)), ylim=(0, 4))
    _bare(ax, ["characters", "bytes", "tokens", "ids"])
    return fig


def draw_splits(splits: Mapping[str, Sequence[bytes]]) -> Figure:
    """Ways to cut the same bytes, one on each row."""
    total = max(sum(map(len, pieces)) for pieces in splits.values())
    fig, ax = plots.figure(width=max(4.5, 0.45 * total), height=0.4 + 0.55 * len(splits))
    for row, pieces in enumerate(splits.values()):
        x = 0
        for position, piece in enumerate(pieces):
            _box(ax, x, len(splits) - 1 - row, len(piece), readable(piece), PALE[position % len(PALE)])
            x += len(piece)
    ax.set(xlim=(0, total), ylim=(0, len(splits)))
    _bare(ax, [f"{name}: {_count(len(pieces))}" for name, pieces in splits.items()])
    return fig


def draw_trie(trie) -> Figure:
    """A small Trie (children, token): dark nodes are entries, with their id; edges carry the byte as a character."""
    fig, ax = plots.figure(width=6.5, height=3)
    leaves = 0

    def place(node, depth: int) -> float:
        nonlocal leaves
        below = [(byte, place(child, depth + 1)) for byte, child in sorted(node.children.items())]
        if not below:
            leaves += 1
        y = sum(height for _, height in below) / len(below) if below else -float(leaves)
        for byte, height in below:
            ax.plot([depth, depth + 1], [y, height], color="#555555", zorder=1)
            ax.text(depth + 0.5, (y + height) / 2, chr(byte), ha="center", va="center", family="monospace",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}, color="black")
        entry = node.token is not None
        ax.scatter(depth, y, s=260, color=plots.COLOURS[0] if entry else "white", edgecolor="#555555", zorder=2)
        ax.text(depth, y, str(node.token) if entry else "", color="white", ha="center", va="center", zorder=3)
        return y

    place(trie, 0)
    ax.margins(0.08, 0.15)
    ax.axis("off")
    return fig
