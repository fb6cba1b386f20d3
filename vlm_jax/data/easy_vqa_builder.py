"""easy-VQA (https://github.com/vzhou842/easy-VQA) as a tensorflow-datasets set, from the pictures in the `easy_vqa` package.

Apart from `easy_vqa.py` because importing tensorflow-datasets is slow, and defining a builder registers it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds


class EasyVqa(tfds.core.GeneratorBasedBuilder):
    """A picture of 64 x 64 pixels, and every question asked of it."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so tfds need not look for checksums beside this file (it would import `importlib_resources`,
    # which it does not declare).
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        # Not `dataset_info_from_configs`: it looks for files of metadata beside this module.
        return tfds.core.DatasetInfo(
            builder=self,
            description="Simple pictures of one coloured shape, and questions about them.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="png"),
                    "image_id": tfds.features.Scalar(np.int64),
                    "questions": tfds.features.Sequence({"question": tfds.features.Text(), "answer": tfds.features.Text()}),
                }
            ),
            homepage="https://github.com/vzhou842/easy-VQA",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        import easy_vqa

        questions = getattr(easy_vqa, f"get_{split}_questions")()
        paths = getattr(easy_vqa, f"get_{split}_image_paths")()
        of_image: dict[int, list[dict[str, str]]] = {image_id: [] for image_id in paths}
        for question, answer, image_id in zip(*questions, strict=True):
            of_image[image_id].append({"question": question, "answer": answer})
        for image_id in sorted(paths):
            yield image_id, {"image": paths[image_id], "image_id": image_id, "questions": of_image[image_id]}
