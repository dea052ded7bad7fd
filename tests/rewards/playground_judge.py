"""A judge that knows the embedded world: it answers questions about test points from the picture it is sent, by the exact verifier."""

import base64
import re
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from visalign import playground
from visalign.types import Prompt

DIMENSIONS = {"Attribute - Color": "colour", "Attribute - Quantity": "count", "Attribute - Shape": "shape",
              "Entity Layout - Two-Dimensional Space": "relation"}


def testpoint_prompt(text):
    """A caption with a test point for each skill it puts to the test."""
    skills = playground.parse(text).skills
    points = [{"dimension": name, "description": f"the {skill} of {text}"} for name, skill in DIMENSIONS.items() if skill in skills]
    return Prompt(text, metadata={"testpoints": points})


testpoint_prompt.__test__ = False


def pictures(request):
    urls = [part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url"]
    return [torch.from_numpy(np.asarray(Image.open(BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")).copy()).permute(2, 0, 1)
            for url in urls]


def truth(request):
    """What an infallible judge writes."""
    text = request["messages"][0]["content"][-1]["text"]
    caption = re.search(r"<caption>(.*?)</caption>", text)[1]
    asked = re.findall(r"^\d+\. ([^:]+): ", text, re.MULTILINE)
    verdict = playground.verify(torch.stack(pictures(request)), [caption])
    marks = [int(verdict.skills[DIMENSIONS[name]][0]) for name in asked]
    analysis = [f"the {DIMENSIONS[name]} is {'as asked' if mark else 'wrong'}" for name, mark in zip(asked, marks, strict=True)]
    return f"<analysis>{analysis}</analysis>\n<score>{marks}</score>"
