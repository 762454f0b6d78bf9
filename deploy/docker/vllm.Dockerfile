# The captioning server on NVIDIA GPUs, on top of vLLM's own image, which brings torch, CUDA's libraries and a compiler:
#
#   docker build -f deploy/docker/vllm.Dockerfile -t vlv:vllm .
#   docker run --gpus all --read-only --tmpfs /tmp --shm-size 8g -v vlv-cache:/cache -v /models/vlv:/models/vlv:ro \
#     -v "$PWD/keys.json:/etc/vlv/keys.json:ro" -p 8000:8000 \
#     vlv:vllm serve.server --ckpt /models/vlv --host 0.0.0.0 --keys /etc/vlv/keys.json
#
# The same once with `serve.server --ckpt /models/vlv --warm` instead fills the volume with what vLLM compiles.
ARG VLLM=vllm/vllm-openai:v0.32.0
ARG PYTHON=python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN pip install setuptools==78.1.1
COPY . .
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${VLLM}
COPY --from=build /wheels /wheels
COPY requirements/cpu.lock requirements/test.lock deploy/docker/sbom.py /build/
# what vLLM does not bring; nothing that it brings is touched
RUN python3 -m pip install --no-cache-dir --no-deps -c /build/cpu.lock -c /build/test.lock diffusers pyarrow prometheus-client python-multipart /wheels/*.whl \
    && python3 -m serve.server --help >/dev/null \
    && python3 /build/sbom.py >/usr/share/vlv.cdx.json \
    && mkdir /cache && chown 10001:10001 /cache
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=vlv XDG_CACHE_HOME=/cache HF_HOME=/cache/hf \
    VLLM_CACHE_ROOT=/cache/vllm TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    FLASHINFER_WORKSPACE_BASE=/cache/flashinfer
WORKDIR /tmp
VOLUME /cache
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["python3", "-m"]
CMD ["serve.server", "--help"]
