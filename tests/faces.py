"""A drawn face: a picture in which NudeNet really detects something (FACE_FEMALE, 0.4 to 0.7), and harmless."""

from __future__ import annotations

import io

from PIL import Image, ImageDraw, ImageFilter

from core.plans import Pixels


def face(side: int = 256) -> Image.Image:
    image = Image.new("RGB", (256, 256), (90, 120, 160))
    draw = ImageDraw.Draw(image)
    draw.ellipse((60, 20, 196, 230), fill=(60, 35, 20))  # hair
    draw.ellipse((75, 45, 181, 215), fill=(224, 172, 140))
    for x in (105, 151):
        draw.ellipse((x - 14, 105, x + 14, 121), fill="white")
        draw.ellipse((x - 6, 106, x + 6, 120), fill=(40, 30, 20))
        draw.line((x - 16, 95, x + 16, 93), fill=(50, 30, 20), width=4)
    draw.polygon([(128, 120), (120, 150), (136, 150)], fill=(200, 150, 120))
    draw.ellipse((105, 170, 151, 186), fill=(170, 60, 60))  # mouth
    return image.filter(ImageFilter.GaussianBlur(2)).resize((side, side), Image.Resampling.LANCZOS)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def pixels(image: Image.Image) -> Pixels:
    return Pixels(width=image.width, height=image.height, data=image.tobytes())
