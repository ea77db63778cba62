// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The programs of campaigns: bundled guests with arguments and input that take well under a tenth of a second natively.

use super::dice::Dice;
use serde::Serialize;

/// A program with all that it is told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Program {
    /// The bundled guest.
    pub image: &'static str,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its stdin. Of several guests only the first has it.
    pub input: String,
}

/// Pages of a guest that has much to free.
const MANY: u64 = 4096;

/// What draws a program's arguments.
type Drawn = fn(&mut Dice) -> (String, String);

/// Simple ones first: a failure is shrunk towards the first.
const PROGRAMS: [(&str, Drawn); 8] = [
    ("hello", |_| Default::default()),
    ("hello-pie", |_| Default::default()),
    ("watcher", |_| Default::default()),
    ("touch", |dice| {
        let order = dice.pick(&["asc", "desc", "random", "stride:36"]).unwrap_or("asc");
        let write = dice.pick(&[0, 30, 100]).unwrap_or(100);
        // Now and then as many as it takes for freed frames to be punched.
        let pages = if dice.one_in(6) { MANY } else { dice.from(1, 512) };
        let (passes, seed) = (dice.from(1, 3), dice.from(0, 9));
        let line = format!(
            "--pages {pages} --order {order} --passes {passes} --write {write} --seed {seed} --verify"
        );
        (line, String::new())
    }),
    ("threads", |dice| {
        let (writers, rounds, pages) = (dice.from(1, 3), dice.from(1, 6), dice.from(2, 12));
        let seed = dice.from(0, 9);
        (format!("--writers {writers} --rounds {rounds} --pages {pages} --seed {seed}"), String::new())
    }),
    ("torture", |dice| {
        let (seed, ops) = (dice.from(0, 99), dice.from(20, 250));
        (format!("{seed} --ops {ops} --pages 128"), String::new())
    }),
    ("memstress", |dice| {
        let (threads, pages) = (dice.from(1, 3), dice.from(1, 100));
        (format!("--threads {threads} --pages {pages}"), "write\nread every 3\nmix times 2\nquit\n".into())
    }),
    ("mix", |dice| {
        let (pages, seed, fill) =
            (dice.from(16, 400), dice.from(0, 9), dice.pick(&["mix", "same", "pairs", "zeros"]));
        let (fill, rewrite) = (fill.unwrap_or("mix"), dice.from(0, 8));
        // Now and then as long as it takes for pages to be merged meanwhile.
        let work =
            if dice.one_in(2) { "verify\n".repeat(dice.from(100, 300) as usize) } else { String::new() };
        let input =
            format!("fill {fill}\nverify\nrewrite {rewrite}\n{work}verify\npoke 5\nwork 1\nverify\nquit\n");
        (format!("--pages {pages} --seed {seed}"), input)
    }),
];

/// The guests that campaigns know how to run, the simple ones first.
pub fn image_names() -> impl Iterator<Item = &'static str> {
    PROGRAMS.iter().map(|(name, _)| *name)
}

impl Program {
    /// The guest of this name, with nothing to do but its shortest work.
    pub(super) fn simplest(image: &'static str) -> Self {
        let args = match image {
            "touch" => "--pages 8 --verify",
            "threads" => "--writers 1 --rounds 1 --pages 2",
            "torture" => "1 --ops 20 --pages 64",
            "memstress" => "--pages 4",
            "mix" => "--pages 16",
            _ => "",
        };
        let input = match image {
            "memstress" => "write\nquit\n",
            "mix" => "fill mix\nverify\nquit\n",
            _ => "",
        };
        Self::new(image, args, input)
    }

    fn new(image: &'static str, args: &str, input: &str) -> Self {
        Self { image, args: args.split_whitespace().map(Into::into).collect(), input: input.into() }
    }

    /// A guest out of `images`, with arguments, as the dice have it.
    pub(super) fn draw(images: &[&'static str], dice: &mut Dice) -> Self {
        let image = dice.pick(images).unwrap_or("hello");
        let drawn = PROGRAMS.iter().find(|(name, _)| *name == image).map(|(_, drawn)| drawn(dice));
        let (args, input) = drawn.unwrap_or_default();
        Self::new(image, &args, &input)
    }

    /// Whether what it says depends on what becomes of its memory, and is no failure: such a guest is not told on.
    pub(super) fn tells_of_memory(&self) -> bool {
        self.image == "watcher"
    }

    /// MiB that it is sure to find room in.
    pub(super) fn memory(&self) -> u64 {
        if self.args.iter().any(|arg| *arg == MANY.to_string()) { 64 } else { 16 }
    }

    /// Programs that do less, those that do least first.
    pub(super) fn smaller(&self) -> Vec<Self> {
        let before = image_names().take_while(|name| *name != self.image);
        let all = before.chain([self.image]).map(Self::simplest);
        all.filter(|program| program != self).collect()
    }

    /// As every further guest of a run finds it: stdin is at its end.
    pub(super) fn without_input(&self) -> Self {
        Self { input: String::new(), ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_is_a_bundled_guest() {
        for name in image_names() {
            assert!(guest_images::find(name).is_some(), "{name}");
        }
    }

    #[test]
    fn smaller_programs_end_with_the_smallest() {
        let mut program = Program::draw(&["mix"], &mut Dice::new(1, 1));
        let mut steps = 0;
        while let Some(smaller) = program.smaller().into_iter().next() {
            program = smaller;
            steps += 1;
            assert!(steps < 100, "it goes in circles");
        }
        assert_eq!(program, Program::simplest("hello"));
    }
}
