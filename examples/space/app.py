"""The page of `hack-pipelines app` as a Hugging Face Space."""

import os

import torch

from hack_pipelines import HackVARPipeline
from hack_pipelines.app.page import launch


# Variables of the Space's settings choose another model.
model = os.environ.get("MODEL", "demo")
gpu = torch.cuda.is_available()
pipe = HackVARPipeline.from_pretrained(
    model, variant=os.environ.get("VARIANT"), dtype=torch.bfloat16 if gpu else torch.float32
)
pipe.set_progress_bar_config(disable=True)
# Gradio finds host and port in the variables that the Space sets.
launch(pipe.to("cuda" if gpu else "cpu"), model)
