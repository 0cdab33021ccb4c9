#!/usr/bin/env bash
# Draw a recording: `bash tools/draw.sh TOOLS RECORDING.cast PICTURE.svg`. The same recording gives the same bytes.
set -euo pipefail
"$1/node_modules/.bin/svg-term" --in "$2" --out "$3" --window --no-cursor --padding 12
