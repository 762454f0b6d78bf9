# The encoder on TensorRT at the edge; captions come from a gateway beside a vLLM in the data centre:
#
#   docker build -f deploy/docker/edge.Dockerfile -t vlv:edge .
#   docker run --gpus all -v /models/vlv:/models/vlv:ro -v /models/vlv-sm89:/artifacts vlv:edge \
#     export.trt --ckpt /models/vlv --out /artifacts --components encoder --precision fp16 --runtime trt --target sm89
#   docker run --gpus all -v /models/vlv:/models/vlv:ro -v /models/vlv-sm89:/artifacts:ro -v /photos:/photos:ro \
#     -v "$PWD/out:/out" -e VLV_API_KEY vlv:edge serve.vllm_caption /photos --ckpt /models/vlv --encoder trt \
#     --artifacts /artifacts --llm-url http://gateway:8002 -o /out/captions.jsonl
#
# The engine is built once, on the node itself. User 10001 writes to /artifacts and /out: chown them to it.
ARG PYTHON=python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/vlv/bin:$PATH
RUN python -m venv /opt/vlv && pip install setuptools==78.1.1
WORKDIR /src
COPY requirements/cpu.lock deploy/docker/edge.txt /build/
RUN pip install -c /build/cpu.lock -r /build/edge.txt
COPY . .
RUN pip install --no-deps --no-build-isolation . \
    && python deploy/docker/sbom.py >/opt/vlv/sbom.cdx.json

FROM ${PYTHON}
COPY --from=build /opt/vlv /opt/vlv
ENV PATH=/opt/vlv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=vlv
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT ["python", "-m"]
CMD ["serve.vllm_caption", "--help"]
