"""The other direction: a tokenizer written as Hugging Face's files, as Meta's tokenizer.model, as GGUF metadata.

Every form is made from the tokenizer alone, whichever file it came from, and gives the same ids when it is opened again.
"""

from herd.tokenizer.write.gguf import gguf_fields
from herd.tokenizer.write.huggingface import hf_files
from herd.tokenizer.write.meta import meta_file

__all__ = ["gguf_fields", "hf_files", "meta_file"]
