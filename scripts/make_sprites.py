"""Draw the sprite sheet of the synthetic world from the Noto Color Emoji font (OFL 1.1).

    python scripts/make_sprites.py NotoColorEmoji.ttf vlv/assets/emoji.png

Only needed to change the set of kinds: the sheet itself is committed.
"""

import sys

from PIL import Image, ImageDraw, ImageFont

from vlv.data.scenes import KINDS, SPRITE

GLYPHS = {
    "apple": "🍎", "banana": "🍌", "carrot": "🥕", "pizza": "🍕", "donut": "🍩", "octopus": "🐙",
    "cat": "🐱", "frog": "🐸", "fish": "🐟", "turtle": "🐢", "butterfly": "🦋", "penguin": "🐧",
    "car": "🚗", "bus": "🚌", "rocket": "🚀", "sailboat": "⛵", "tree": "🌲", "sunflower": "🌻",
    "star": "⭐", "heart": "❤", "guitar": "🎸", "ball": "⚽", "crown": "👑", "cactus": "🌵",
}  # fmt: skip


def main(font_path: str, out: str) -> None:
    font = ImageFont.truetype(font_path, 109)  # the one size of the font's embedded bitmaps
    sheet = Image.new("RGBA", (SPRITE * len(KINDS), SPRITE))
    for i, kind in enumerate(KINDS):
        glyph = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(glyph).text((10, 10), GLYPHS[kind], font=font, embedded_color=True)
        glyph = glyph.crop(glyph.getbbox())
        side = max(glyph.size)
        square = Image.new("RGBA", (side, side))
        square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
        sheet.paste(square.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS), (SPRITE * i, 0))
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
