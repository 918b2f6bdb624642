# The service with the demo's three tasks (docs/serving.md, "In a container"):
#   docker build -t visprompt .                             for CPUs
#   docker build -t visprompt --build-arg TORCH=cuda .      for NVIDIA GPUs
#   docker run -p 127.0.0.1:8000:8000 visprompt             (with a GPU: --gpus all)
FROM python:3.13-slim-bookworm

# cpu: torch and torchvision are PyTorch's builds without CUDA, of the versions in uv.lock; cuda: those of uv.lock
ARG TORCH=cpu
ENV UV_PYTHON_DOWNLOADS=never UV_PROJECT_ENVIRONMENT=.venv UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1
ENV PATH=/visprompt/.venv/bin:$PATH
WORKDIR /visprompt
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# as the Makefile does: uv by its hashes, everything else by the hashes in uv.lock
COPY requirements-uv.txt ./
RUN python -m venv .uv \
 && .uv/bin/python -m pip install --no-cache-dir --only-binary :all: --require-hashes -r requirements-uv.txt
COPY pyproject.toml uv.lock ./
RUN what=(--frozen --no-dev --extra serve --no-install-project); \
    listed=$(.uv/bin/uv export --frozen --no-dev --extra serve --no-emit-project --no-hashes); \
    case "$TORCH" in \
      cuda) .uv/bin/uv sync "${what[@]}" ;; \
      cpu) mapfile -t left_out < <(sed -nE 's/^(torch|torchvision|triton|(cuda|nvidia)-[a-z0-9-]+)==.*/--no-install-package=\1/p' <<<"$listed"); \
        mapfile -t torch < <(sed -nE 's/^((torch|torchvision)==[^ ]+).*/\1/p' <<<"$listed"); \
        .uv/bin/uv sync "${what[@]}" "${left_out[@]}"; \
        .uv/bin/uv pip install --no-deps --torch-backend cpu "${torch[@]}" ;; \
      *) echo "TORCH=$TORCH is not cpu or cuda: build with --build-arg TORCH=cpu or TORCH=cuda." >&2; exit 1 ;; \
    esac
COPY README.md LICENSE ./
COPY src src
RUN .uv/bin/uv pip install --no-deps --editable .
COPY configs configs

# the service writes only its log, and nothing as root
RUN useradd --uid 1000 --create-home visprompt && install -d -o visprompt logs
USER 1000:1000
# at build time, so that every container answers within seconds, and all with the same states
RUN python src/train.py tasks=demo method=vapt paths.log_dir=logs/serve trainer=cpu

EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=15s --timeout=5s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
# python is process 1, so that SIGTERM reaches it and no accepted request is lost
ENTRYPOINT ["python"]
CMD ["src/serve.py", "states=logs/serve", "host=0.0.0.0"]
