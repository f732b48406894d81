"""Entry point that registers Sparsight as a model of lmms-eval; loaded while lmms-eval is imported."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("sparsight", chat_class_path="sparsight.eval.lmms_model.LmmsModel")
