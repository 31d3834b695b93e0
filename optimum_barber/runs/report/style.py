"""How series are told apart: by colour (Okabe and Ito's, safe for the colour-blind), dash and marker at once."""

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#4d4d4d", "#000000")
DARK = ("#56b4e9", "#e69f00", "#1fc49a", "#cc79a7", "#f0e442", "#d55e00", "#b0b0b0", "#ffffff")
DASHES = ("", "6 3", "2 2", "8 3 2 3", "", "6 3", "2 2", "8 3 2 3")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SHAPES = {  # outlines around (0, 0), for a path
    "o": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
    "s": "M-2.7-2.7h5.4v5.4h-5.4z",
    "^": "M0-3.4L3.2 2.6H-3.2z",
    "D": "M0-3.6L3.6 0L0 3.6L-3.6 0z",
    "v": "M0 3.4L3.2-2.6H-3.2z",
    "P": "M-1-3h2v2h2v2h-2v2h-2v-2h-2v-2h2z",
    "X": "M-3-2L-2-3L0-1L2-3L3-2L1 0L3 2L2 3L0 1L-2 3L-3 2L-1 0z",
    "*": "M0-3.8L1-1L3.8-1L1.6 .8L2.4 3.6L0 1.9L-2.4 3.6L-1.6 .8L-3.8-1L-1-1z",
}
LEVELS = ("#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838")  # cividis: one hue order for every eye


def level(share: float) -> tuple[str, str]:
    """Colour of a share in [0, 1] (dark is 1), and the colour of text upon it."""
    first, rest = divmod((1 - min(max(share, 0.0), 1.0)) * (len(LEVELS) - 1), 1)
    ends = [LEVELS[int(first)], LEVELS[min(int(first) + 1, len(LEVELS) - 1)]]
    low, high = ([int(end[i : i + 2], 16) for i in (1, 3, 5)] for end in ends)
    mixed = [round(a + (b - a) * rest) for a, b in zip(low, high, strict=True)]
    bright = 0.2126 * mixed[0] + 0.7152 * mixed[1] + 0.0722 * mixed[2]
    return "#" + "".join(f"{part:02x}" for part in mixed), "#000000" if bright > 128 else "#ffffff"
