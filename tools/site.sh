#!/usr/bin/env bash
# Install what draws the docs' diagrams (mermaid) and recordings (svg-term-cli) into a folder: `bash tools/site.sh FOLDER`.
set -euo pipefail
mkdir -p "$1"
cd "$1"
npm install --silent --no-audit --no-fund --prefix . mermaid@11.12.0 svg-term-cli@2.1.1
