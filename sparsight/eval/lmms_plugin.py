"""How lmms-eval finds Sparsight among its models: it loads this while it is itself being loaded."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("sparsight", chat_class_path="sparsight.eval.lmms_model.LmmsModel")
