"""Writing an image classifier as ONNX: pixels in, logits out, normalisation and class head inside.

pixels          uint8 [batch, S, S, 3]   RGB, resized and cropped as the model card says; any batch
logits          float32 [batch, classes]
image_features  float32 [batch, D]       rows of length 1, before the class head
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from carft_ray.model.classifier import ImageClassifier
from carft_ray.model.weights_files import quiet

ONNX_NAME = "model.onnx"
MAX_SINGLE_FILE = 1_500_000_000  # bytes; a protobuf holds 2 GiB, larger weights are in model.onnx.data next to it


class _Deployed(nn.Module):
    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        features_BD = self.classifier.features(pixels_BHWC)
        return self.classifier.logits(features_BD), functional.normalize(features_BD, dim=-1)


def write_onnx(folder: Path, classifier: ImageClassifier, image_size: int, metadata: Mapping[str, str]) -> None:
    """Writes ``model.onnx``; the caller flushes the files and makes the folder appear whole.

    Args:
        folder: An existing folder.
        classifier: On the CPU, float32, in eval mode.
        image_size: S, side of its input in pixels.
        metadata: Texts to keep in the file.
    """
    pixels_BHWC = torch.zeros((2, image_size, image_size, 3), dtype=torch.uint8)  # a batch of 1 would become fixed
    # the exporter warns of what is within torch itself, and logs which constants it did not fold
    with quiet(), torch.no_grad():
        program: torch.onnx.ONNXProgram = torch.onnx.export(  # type: ignore[assignment]  # None only without dynamo
            _Deployed(classifier).eval(),
            (pixels_BHWC,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["pixels"],
            output_names=["logits", "image_features"],
            verbose=False,
        )
        for node in program.model.graph:
            node.metadata_props.clear()  # stack traces, with the paths of this machine
        program.model.metadata_props.update(metadata)
        num_bytes = sum(tensor.nbytes for tensor in classifier.state_dict().values())
        program.save(str(folder / ONNX_NAME), external_data=num_bytes > MAX_SINGLE_FILE)
