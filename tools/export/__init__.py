"""Write trained networks for use elsewhere, each file tried out before it takes its name.

Without the projector a file holds the backbone alone, with it both:

| suffix | holds | backbone alone | with the projector |
|---|---|---|---|
| `.pth` | tensors | torchvision's, as the authors' `resnet50.pth` | the authors' `checkpoint.pth` |
| `.safetensors` | tensors, metadata | torchvision's names | `backbone.*` and `projector.*` |
| `.onnx`, `.pt2`, `.ts`, `.torchscript` | a program, metadata | `features` | `features` and `embeddings` |

The metadata are the architecture, the normalisation of the images and the projector's widths. The input of a
program is `images`: float32 (N, 3, H, W), normalised by the mean and deviation in the metadata, N, H and W at
will; the outputs are float32 (N, F) and (N, D).
"""

from tools.export.export import FORMATS, Exported, export_backbone, export_twin

__all__ = ["FORMATS", "Exported", "export_backbone", "export_twin"]
