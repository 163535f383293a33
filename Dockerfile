# tightfit with torch's CPU build: it predicts for any card, and trains on the processor.
#   docker build -t tightfit .
#   docker run --rm -v "$PWD:/data" tightfit dryrun --gpu "RTX 3060 12GB" train.py
# Files that it writes belong to user 1000; add --user "$(id -u):$(id -g)" for your own.
FROM python:3.13-slim AS build
WORKDIR /source
COPY constraints.txt ./
RUN python -m venv /opt/tightfit \
    && /opt/tightfit/bin/pip install --no-cache-dir --constraint constraints.txt \
        --index-url https://download.pytorch.org/whl/cpu torch
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY src src
RUN /opt/tightfit/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM python:3.13-slim
RUN useradd --create-home --uid 1000 tightfit
COPY --from=build /opt/tightfit /opt/tightfit
ENV PATH=/opt/tightfit/bin:$PATH
USER 1000
WORKDIR /data
ENTRYPOINT ["tightfit"]
CMD ["--help"]
