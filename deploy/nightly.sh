#!/bin/sh
# The nightly run: what is new in the logs becomes features, then the stores and the model are
# looked at. Every step does only what is new and can be run again after a kill. The service need
# not stop: it reads the new values as they arrive.
#
# LONGTRAIL_DATASET         the data set's TOML file (docs/data.md); needed
# LONGTRAIL_ENCODE_OPTIONS  of `longtrail encode`, where the encoder is not the default one, such as
#                           "--model /data/home/models/tuned"
# LONGTRAIL_HOME, LONGTRAIL_PROFILE, DATABASE_URL, REDIS_URL  as for every command
set -eu
: "${LONGTRAIL_DATASET:?set it to the data set file}"

longtrail ingest "$LONGTRAIL_DATASET"
# shellcheck disable=SC2086 # options are words
longtrail encode ${LONGTRAIL_ENCODE_OPTIONS:-}
longtrail sequences
longtrail apply # before export, which reads features, and after it, which makes views of a new run
longtrail export
longtrail apply
longtrail materialize

# From here on nothing is changed. Each look is taken, whatever the others say; a finding makes the
# night fail, so that somebody reads it. That nothing was served or shown lately is no finding.
status=0
longtrail parity --join fast || status=1
if [ -d "${LONGTRAIL_HOME:-var}/served" ]; then # where `longtrail serve --served-log` writes
    longtrail parity --served --join fast --since "$(date --utc --date=yesterday +%F)" || status=1
fi
longtrail drift || status=1
exit "$status"
