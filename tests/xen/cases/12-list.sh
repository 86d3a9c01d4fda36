# backends: xbd
# `xbd list` shows the disk of a running guest, for people and for programs. It is served on the data path
# that was asked for, as fast as that can be here.
image disk.img 16
guest shown "$(disk xvda /scratch/disk.img)" <<'JOB'
wait_disk xvda
echo "RESULT disk is there"
sleep 600
JOB
wait_line shown '^RESULT disk' 120
name=xbdback$(xl domid shown)i51712
xbd list | tee table
xbd list --json | tee json
xl destroy shown
grep -q "^$name .*connected" table || fail "the table does not show $name as connected"
python3 - "$name" "$DATAPATH, io_uring, persistent" <<'PYTHON'
import json, sys
with open("json") as file:
    (disk,) = json.load(file)
assert [disk["name"], disk["data_path"]] == sys.argv[1:], disk
PYTHON
