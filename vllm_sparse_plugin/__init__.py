"""A vLLM attention backend that runs `sparse_attention_hub` maskers on the paged KV cache.

Selected with `vllm serve MODEL --attention-backend CUSTOM --additional-config
'{"sparse_attention": "streaming-llm"}'`. Installed but not selected, vLLM is as it was.

Importing this package imports neither vLLM nor torch: vLLM finds the pieces through entry points.
"""
