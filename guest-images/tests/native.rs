// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs every image natively and compares its whole output. What is written here is what the images must
//! print under umbra too: it depends on the arguments alone.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Output, Stdio};

/// Runs an image through the native runner.
fn guest(line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_guest-images"))
        .args(line.split_whitespace())
        .output()
        .expect("the runner can be started")
}

/// The same with `input` on stdin.
fn told(line: &str, input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_guest-images"))
        .args(line.split_whitespace())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the runner can be started");
    let mut stdin = child.stdin.take().expect("stdin is a pipe");
    // A guest that refuses a command reads no further.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("the runner ends")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("guests print UTF-8")
}

/// Expects `line` to print just `stdout`, nothing on stderr, and to end with status 0.
#[track_caller]
fn prints(line: &str, stdout: &str) {
    let run = guest(line);
    assert_eq!((text(&run.stdout), text(&run.stderr), run.status.code()), (stdout, "", Some(0)), "{line}");
}

#[test]
fn hello_greets_in_both_elf_types() {
    let greeting = "hello from ring 3: stack, data, bss, brk and mmap answer (checksum 62b06fc823e14792)\n";
    prints("hello", greeting);
    prints("hello-pie", greeting);
}

#[test]
fn touch_prints_what_the_arguments_decide() {
    prints("touch --pages 64", "touch: 64 pages, 1 passes, checksum 42e641543acd14b2\n");
    prints(
        "touch --pages 100 --order desc --passes 3 --write 30 --seed 9 --verify",
        "touch: 100 pages, 3 passes, checksum 8f59909a64780b67\n",
    );
    prints(
        "touch --pages 100 --order random --write 50 --pattern deadbeef --passes 2 --verify",
        "touch: 100 pages, 2 passes, checksum 13df6a511e692054\n",
    );
    prints(
        "touch --pages 96 --order stride:36 --verify",
        "touch: 96 pages, 1 passes, checksum 4b438fd3a76dcf80\n",
    );
}

#[test]
fn victim_has_nothing_to_say_of_healthy_memory() {
    prints("victim", "victim: 64 pages hold what they must\n");
    prints("victim --pages 1 --heap --rounds 5 --pause 1 --grow 3", "victim: 1 pages hold what they must\n");
    let run = guest("victim --pages 2 --where");
    let (first, rest) = text(&run.stdout).split_once('\n').unwrap();
    assert!(first.starts_with("victim: pages from 0x"), "{first}");
    assert_eq!((rest, run.status.code()), ("victim: 2 pages hold what they must\n", Some(0)));
}

/// With every page written, --verify sees a page that an order left out: it would hold zero.
#[test]
fn every_order_of_touch_reaches_every_page() {
    for pages in [1, 2, 3, 31, 64, 1000] {
        for order in ["asc", "desc", "random", "stride:1", "stride:6", "stride:1000", "stride:1001"] {
            let line = format!("touch --pages {pages} --order {order} --verify");
            let run = guest(&line);
            assert_eq!((text(&run.stderr), run.status.code()), ("", Some(0)), "{line}");
        }
    }
}

#[test]
fn touch_tells_the_time_of_each_pass() {
    let run = guest("touch --pages 8 --passes 2 --time");
    let lines: Vec<&str> = text(&run.stdout).lines().collect();
    let [first, second, last] = lines[..] else { panic!("expected three lines, got {lines:?}") };
    for (line, name) in [(first, "pass 1: "), (second, "pass 2: ")] {
        let (total, each) = line
            .strip_prefix(name)
            .and_then(|times| times.strip_suffix(" us/page"))
            .and_then(|times| times.split_once(" ns, "))
            .expect(line);
        let (total, each): (u64, f64) = (total.parse().expect(line), each.parse().expect(line));
        assert!((total as f64 / 8000.0 - each).abs() <= 0.001, "{line}");
    }
    assert!(last.starts_with("touch: 8 pages, 2 passes, checksum "), "{last}");
}

/// Name and checksum of each kind, without its time.
fn computed(line: &str) -> Vec<(String, String)> {
    let run = guest(line);
    assert_eq!((text(&run.stderr), run.status.code()), ("", Some(0)), "{line}");
    let kind = |line: &str| {
        let (name, rest) = line.split_once(": ")?;
        let (time, checksum) = rest.split_once(" ns, checksum ")?;
        time.parse::<u64>().ok()?;
        Some((name.to_owned(), checksum.to_owned()))
    };
    text(&run.stdout).lines().map(|line| kind(line).expect(line)).collect()
}

#[test]
fn compute_comes_to_the_same_results_each_time() {
    let kinds = computed("compute");
    let names: Vec<&str> = kinds.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["chain", "sort", "calls", "bytes", "floats"]);
    assert_eq!(kinds, computed("compute --rounds 1"));
    for (once, twice) in kinds.iter().zip(computed("compute --rounds 2")) {
        assert_ne!(once.1, twice.1, "the second round of {} computes nothing", once.0);
    }
}

#[test]
fn syscalls_tells_a_time_for_each_call() {
    let run = guest("syscalls --calls 50");
    assert_eq!((text(&run.stderr), run.status.code()), ("", Some(0)));
    let lines: Vec<&str> = text(&run.stdout).lines().collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    for (line, (name, times)) in lines.iter().zip([("getpid", 50), ("clock_gettime", 50), ("mmap", 5)]) {
        let (start, end) = (format!("{name}: "), format!(" ns, {times} times"));
        let time = line.strip_prefix(&start).and_then(|line| line.strip_suffix(&end)).expect(line);
        assert!(time.parse::<u64>().expect(line) > 0, "{line}");
    }
}

/// The number of rounds must not show, or a run for a time could be compared with nothing.
#[test]
fn threads_prints_the_same_however_long_it_runs() {
    for line in
        ["threads --rounds 1", "threads --rounds 40", "threads --seconds 1", "threads --pages 3 --rounds 9"]
    {
        prints(line, "threads: ok, checksum 978f8876f0a3e62d\n");
    }
    prints("threads --writers 3 --seed 5 --pages 4 --rounds 20", "threads: ok, checksum 70825f6191a384c6\n");
    let run = guest("threads --stats --rounds 3");
    assert_eq!(text(&run.stdout), "threads: ok, checksum 978f8876f0a3e62d\n");
    assert!(text(&run.stderr).starts_with("threads: 3 rounds, "), "{}", text(&run.stderr));
}

#[test]
fn torture_prints_what_the_seed_decides() {
    prints("torture 7 --ops 300", "torture seed 7: 300 ops, checksum 342ffdb8b2114b1a\n");
    prints(
        "torture 0..2 --ops 100 --pages 64",
        "torture seed 0: 100 ops, checksum 1e80d040eca8f3b1\n\
         torture seed 1: 100 ops, checksum a4342a8fe4d9371e\n\
         torture seed 2: 100 ops, checksum 192d75bcc50c6a94\n",
    );
    prints(
        "torture 3 --ops 2 --trace",
        "op 0: brk to 0x0 bytes\n\
         op 1: mprotect pages 164+13 none\n\
         op 2: mprotect pages 68+13 rw\n\
         op 3: check of everything\n\
         torture seed 3: 2 ops, checksum d6f3fded69e862ea\n",
    );
}

/// Alone a thread loses nothing; among others it may, and then says so.
#[test]
fn race_loses_updates_only_to_others() {
    for mode in ["exits", "steps"] {
        prints(&format!("race {mode} --threads 1 --every 1"), "race: 50 updates, none lost\n");
        let run = guest(&format!("race {mode} --threads 4 --iterations 1000 --every 2"));
        match run.status.code() {
            Some(0) => assert_eq!(text(&run.stdout), "race: 4000 updates, none lost\n"),
            code => {
                assert_eq!((code, text(&run.stdout)), (Some(1), ""));
                assert!(text(&run.stderr).ends_with(" of 4000 updates are lost\n"), "{}", text(&run.stderr));
            }
        }
    }
    prints("race spin --threads 3", "race: 3 threads have spun\n");
}

/// What the guest of `umbra run --adopt-demo` sees of umbra's mappings is what a program sees of its own.
#[test]
fn watcher_sees_each_change() {
    prints(
        "watcher",
        "at first: ada0 ada1 ada2 ada3 ada4 ada5 ada6 ada7\n\
         page 3 written: ada0 ada1 ada2 2e35 ada4 ada5 ada6 ada7\n\
         pages 1 and 2 discarded: ada0 0 0 2e35 ada4 ada5 ada6 ada7\n\
         all moved: ada0 0 0 2e35 ada4 ada5 ada6 ada7\n\
         pages 4 and 5 unmapped: ada0 0 0 2e35 gone gone ada6 ada7\n\
         pages 6 and 7 moved: ada0 0 0 2e35 gone gone ada6 ada7\n\
         all unmapped: gone gone gone gone gone gone gone gone\n",
    );
}

/// An answer without its time, which must be a number of nanoseconds.
fn timeless(line: &str) -> String {
    let (verb, rest) = line.split_once(": ").expect(line);
    let Some((time, rest)) = rest.split_once(" ns, ") else { return line.to_owned() };
    time.parse::<u64>().expect(line);
    format!("{verb}: {rest}")
}

#[test]
fn memstress_does_what_each_command_says() {
    let commands =
        "read\nwrite\nwrite every 100\nmix times 3\nread every 7 times 2\nread every 5000\nquit\nread\n";
    let pages = [
        ("memstress --threads 2 --pages 1000", [2000, 2000, 20, 6000, 572, 2]),
        ("memstress --threads 3 --pages 1000 --overlap --write-percent 40", [3000, 3000, 30, 9000, 858, 3]),
        ("memstress --pages 10 --random --seed 5 --spin 10", [10, 10, 1, 30, 4, 1]),
    ];
    for (line, accesses) in pages {
        let run = told(line, commands);
        assert_eq!((text(&run.stderr), run.status.code()), ("", Some(0)), "{line}");
        let got: Vec<String> = text(&run.stdout).lines().map(timeless).collect();
        let verbs = ["read", "write", "write", "mix", "read", "read"];
        let expected: Vec<String> =
            verbs.iter().zip(accesses).map(|(verb, count)| format!("{verb}: {count} accesses")).collect();
        assert_eq!(got, expected, "{line}");
    }
}

#[test]
fn memstress_runs_free_until_it_is_stopped() {
    let run = told("memstress --threads 2 --pages 8", "run 1\nrun 2\nwhere\nstop\nwrite\nrun 3\n");
    assert_eq!((text(&run.stderr), run.status.code()), ("", Some(0)));
    let lines: Vec<&str> = text(&run.stdout).lines().collect();
    let [first, second, place, stop, write, last] = lines[..] else { panic!("{lines:?}") };
    assert_eq!((first, second, last), ("run: 1", "run: 2", "run: 3"));
    assert!(place.starts_with("where: 0x") && place.ends_with("000 16"), "{place}");
    assert!(stop.starts_with("stop: ") && stop.ends_with(" accesses"), "{stop}");
    assert_eq!(timeless(write), "write: 16 accesses");
}

#[test]
fn memstress_ends_with_its_input_and_refuses_what_it_does_not_know() {
    for input in ["", "quit", "quit\n"] {
        let run = told("memstress --threads 2", input);
        assert_eq!((text(&run.stdout), text(&run.stderr), run.status.code()), ("", "", Some(0)), "{input:?}");
    }
    let long = "x".repeat(200);
    for command in [
        "\n",
        "wrte",
        "write 5",
        "write every",
        "write every 0",
        "read times x",
        "run",
        "run x",
        "run 1 2",
        "stop",
        "where 1",
        "quit now",
        "run 1\nread",
        &long,
    ] {
        let run = told("memstress", command);
        assert_eq!(run.status.code(), Some(2), "{command:?}");
        assert_eq!(text(&run.stderr).lines().count(), 1, "{command:?}: {}", text(&run.stderr));
        assert!(text(&run.stderr).contains("command"), "{command:?}: {}", text(&run.stderr));
    }
}

/// An answer without its times.
fn without_times(line: &str) -> String {
    let is_kept = |part: &&str| !part.ends_with(" ns");
    line.split(", ").filter(is_kept).collect::<Vec<_>>().join(", ")
}

#[test]
fn mix_holds_what_the_arguments_say() {
    let commands = "fill mix\nverify\nrewrite 5\nrewrite 3 own\nrewrite 0\nverify\nfill pairs\nverify\n\
                    fill same\nverify\nfill zeros\nverify\n";
    let load = "load 2\n".to_owned() + &"\0".repeat(4096) + &"a".repeat(4096);
    let last = "verify\nwrite 1 own\nwrite 99 shared\npoke 30\nwork 2\nverify\nquit\nverify\n";
    let run = told("mix --pages 100 --seed 3", &(commands.to_owned() + &load + last));
    assert_eq!((text(&run.stderr), run.status.code()), ("", Some(0)));
    let got: Vec<String> = text(&run.stdout).lines().map(without_times).collect();
    assert_eq!(
        got,
        [
            "fill: 100 pages",
            "verify: 3f34e5c40039ae0f",
            "rewrite: 5 pages",
            "rewrite: 3 pages",
            "rewrite: 0 pages",
            "verify: e937b44e6b05d4c4",
            "fill: 100 pages",
            "verify: 35a599955b408788",
            "fill: 100 pages",
            "verify: 290c44fc91662f35",
            "fill: 100 pages",
            "verify: d988ef759a123849",
            "load: 2 pages",
            "verify: 5422564f47abd520",
            "write: 0 pages",
            "write: 50 pages",
            "poke: 4 pages",
            "f05fa87c96fc3c10",
            "verify: 241d2d0a2a5551f2",
        ]
    );
}

/// The same bytes from elsewhere have the same checksum.
#[test]
fn mix_is_filled_with_what_it_says() {
    let loaded = |bytes: String| {
        let run = told("mix --pages 50", &format!("load 1\n{bytes}verify\n"));
        text(&run.stdout).lines().last().map(str::to_owned)
    };
    for (filling, byte) in [("same", "*"), ("zeros", "\0")] {
        let run = told("mix --pages 50", &format!("fill {filling}\nverify\n"));
        assert_eq!(loaded(byte.repeat(4096)).as_deref(), text(&run.stdout).lines().last(), "{filling}");
    }
}

/// A kernel without KSM takes neither advice.
#[test]
fn mix_says_what_may_be_merged() {
    let run = told("mix --pages 10", "mergeable\nunmergeable\n");
    let without_ksm = text(&run.stderr).contains("EINVAL");
    assert!(without_ksm || run.status.code() == Some(0), "{}", text(&run.stderr));
    assert_eq!(text(&run.stdout).lines().count(), if without_ksm { 0 } else { 2 });
}

#[test]
fn mix_ends_with_its_input_and_refuses_what_it_does_not_know() {
    for input in ["", "quit", "quit\n"] {
        let run = told("mix", input);
        assert_eq!((text(&run.stdout), text(&run.stderr), run.status.code()), ("", "", Some(0)), "{input:?}");
    }
    for command in [
        "\n",
        "fil",
        "fill",
        "fill mess",
        "load",
        "load 0",
        "write 1",
        "write 0 own",
        "poke 0",
        "work",
        "rewrite x",
        "verify 1",
        "load 11",
    ] {
        let run = told("mix --pages 10", command);
        assert_eq!((text(&run.stdout), run.status.code()), ("", Some(2)), "{command:?}");
        assert_eq!(text(&run.stderr).lines().count(), 1, "{command:?}: {}", text(&run.stderr));
    }
    // The end comes before what was to be loaded has.
    let run = told("mix --pages 10", "load 2\nabc");
    assert_eq!((run.status.code(), text(&run.stderr).lines().count()), (Some(1), 1), "{}", text(&run.stderr));
}

/// Linux must agree with the model, or the model is wrong.
#[test]
fn torture_finds_no_fault_in_linux() {
    for line in ["torture 1..200", "torture 1..20 --ops 5000 --pages 64", "torture 1..10 --pages 4096"] {
        let (first, second) = (guest(line), guest(line));
        assert_eq!((text(&first.stderr), first.status.code()), ("", Some(0)), "{line}");
        assert_eq!(text(&first.stdout), text(&second.stdout), "{line}");
    }
}

/// The trace of many operations names each kind of them, so that none has gone missing.
#[test]
fn torture_does_all_that_it_can() {
    let run = guest("torture 1 --ops 20000 --trace");
    let kinds: BTreeSet<&str> = text(&run.stdout)
        .lines()
        .filter_map(|line| line.split_once(": ")?.1.split([' ', ',']).next())
        .collect();
    let expected =
        ["brk", "check", "fill", "load", "madvise", "mmap", "mprotect", "mremap", "munmap", "store"];
    for kind in expected {
        assert!(kinds.contains(kind), "no {kind} in {kinds:?}");
    }
}

#[test]
fn a_wrong_command_line_ends_with_status_2_and_one_line() {
    for line in [
        "hello x",
        "hello-pie --x",
        "touch --pages 0",
        "touch --pages 0x",
        "touch --pages +1",
        "touch --pages",
        "touch --order sideways",
        "touch --order stride:0",
        "touch --pattern 123456789abcdef01",
        "touch --write 101",
        "touch x",
        "compute x",
        "compute --rounds 0",
        "syscalls x",
        "syscalls --calls 9",
        "threads --rounds 5 --seconds 1",
        "threads --writers 0",
        "threads --writers 65",
        "threads x",
        "victim x",
        "victim --until never",
        "victim --pages 4097",
        "torture",
        "torture 1 2",
        "torture 5..2",
        "torture 1..",
        "torture --ops 5",
        "torture 1 --pages 63",
        "torture 1 --x",
        "memstress x",
        "memstress --threads 0",
        "memstress --threads 65",
        "memstress --pages 0",
        "memstress --write-percent 101",
        "mix x",
        "mix --pages 0",
        "mix --zero 101",
        "mix --zero 60 --dup 41",
        "mix --copies 1",
        "watcher --board",
        "watcher x",
        "nonsense",
    ] {
        let run = guest(line);
        let stderr = text(&run.stderr);
        assert_eq!((text(&run.stdout), run.status.code()), ("", Some(2)), "{line}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{line}: {stderr}");
        assert!(stderr.ends_with('\n'), "{line}: {stderr}");
    }
}

#[test]
fn help_prints_the_usage_that_the_library_knows() {
    for image in guest_images::all() {
        prints(&format!("{} --help", image.name), &format!("usage: {}\n", image.usage));
    }
}

#[test]
fn without_arguments_the_runner_lists_the_images() {
    let run = guest("");
    assert_eq!(run.status.code(), Some(0));
    for image in guest_images::all() {
        for part in [image.name, image.summary, image.usage] {
            assert!(text(&run.stdout).contains(part), "{part} is missing");
        }
    }
}

/// A program that could not say what it found has failed.
#[test]
fn a_full_disk_is_a_failure() {
    let full = std::fs::File::options().write(true).open("/dev/full").expect("/dev/full exists");
    let status = Command::new(env!("CARGO_BIN_EXE_guest-images"))
        .arg("hello")
        .stdout(full)
        .status()
        .expect("the runner can be started");
    assert_eq!(status.code(), Some(1));
}
