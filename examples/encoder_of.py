"""Save the encoder of a captioner with its image processor, as the start of another captioner.

python examples/encoder_of.py examples/demo-model build/encoder
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoImageProcessor, VisionEncoderDecoderModel


def main() -> None:
    parser = argparse.ArgumentParser(description="Save the encoder of a captioner.")
    parser.add_argument("captioner", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    VisionEncoderDecoderModel.from_pretrained(options.captioner).encoder.save_pretrained(options.out)
    AutoImageProcessor.from_pretrained(options.captioner).save_pretrained(options.out)


if __name__ == "__main__":
    main()
