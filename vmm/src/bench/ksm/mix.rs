// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the memory is filled with, and how many of its pages that lets anybody save.
//!
//! The guest `mix` makes the bytes; what is counted here follows from the same arguments by the same rules, and is what the
//! saving of either side is checked against.

use anyhow::{Context, Result, bail};
use shadow_mmu::addr::PAGE_SIZE;
use std::collections::HashMap;

/// Content of the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mix {
    /// Random numbers: so many pages are zero, so many equal to some others, the rest like no other.
    Shares(Shares),
    /// The same, and a hundredth of the pages a second, of those like no other, is rewritten all the time.
    Rewrite(Shares),
    /// Pages of umbra's own executable, as often as there is room, at least as often as the copies say.
    Image {
        /// At least so many pages are equal.
        copies: u64,
    },
}

/// Percentages of the pages, which add up to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// Zero.
    pub zero: u64,
    /// In groups of equal pages.
    pub dup: u64,
    /// Like no other.
    pub unique: u64,
    /// Pages of a group; 2 to 256.
    pub copies: u64,
}

/// Pages of a group where nobody says otherwise.
const COPIES: u64 = 4;

impl Default for Shares {
    fn default() -> Self {
        Self { zero: 25, dup: 50, unique: 25, copies: COPIES }
    }
}

impl Shares {
    /// `zero=25,dup=50,unique=25`, in any order; what is not named is 0.
    ///
    /// # Errors
    /// One line: a word that is none of these, named twice, or no percentage; a sum that is not 100.
    fn parse(text: &str) -> Result<Self, String> {
        let mut named = [None; 3];
        for word in text.split(',') {
            let (name, value) = word.split_once('=').ok_or_else(|| bad_word(word))?;
            let at = ["zero", "dup", "unique"].iter().position(|known| *known == name);
            let share = &mut named[at.ok_or_else(|| bad_word(word))?];
            let percent = value.parse::<u64>().ok().filter(|percent| *percent <= 100);
            let percent =
                percent.ok_or_else(|| format!("`{word}`: a share is a whole number from 0 to 100"))?;
            if share.replace(percent).is_some() {
                return Err(format!("`{text}` names `{name}` twice"));
            }
        }
        let [zero, dup, unique] = named.map(Option::unwrap_or_default);
        match zero + dup + unique {
            100 => Ok(Self { zero, dup, unique, copies: COPIES }),
            sum => Err(format!("`{text}` adds up to {sum}, not to 100")),
        }
    }
}

fn bad_word(word: &str) -> String {
    format!("`{word}` is no mix: give zero=N,dup=N,unique=N in percent, or `rewrite`, or `image`")
}

impl Mix {
    /// A word of the command line: `rewrite`, `image`, or shares as `zero=25,dup=50,unique=25`.
    ///
    /// # Errors
    /// One line: a word that is none of these, named twice, or no percentage; a sum that is not 100.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "rewrite" => Ok(Self::Rewrite(Shares::default())),
            "image" => Ok(Self::Image { copies: COPIES }),
            _ => Shares::parse(text).map(Self::Shares),
        }
    }

    /// The same with so many equal pages to a group, 2 to 256.
    pub fn with_copies(mut self, count: u64) -> Self {
        match &mut self {
            Self::Shares(Shares { copies, .. }) | Self::Rewrite(Shares { copies, .. }) => *copies = count,
            Self::Image { copies } => *copies = count,
        }
        self
    }
}

/// Memory of one size with that content.
#[derive(Debug, Clone)]
pub(super) struct Content {
    /// Pages in all.
    pub(super) pages: u64,
    /// How many are zero.
    zero: u64,
    /// Sizes of the groups of equal pages, and how many there are of each.
    groups: HashMap<u64, u64>,
    /// What is loaded into the program, whole pages; empty where it makes its own.
    pub(super) image: Vec<u8>,
    /// The program's arguments.
    pub(super) words: Vec<String>,
}

impl Content {
    /// # Errors
    /// umbra's executable cannot be read; too few pages for that many copies.
    pub(super) fn new(mix: &Mix, pages: u64, seed: u64) -> Result<Self> {
        let mut words = vec!["--pages".into(), pages.to_string(), "--seed".into(), seed.to_string()];
        match mix {
            Mix::Shares(shares) | Mix::Rewrite(shares) => {
                let Shares { zero, dup, copies, .. } = *shares;
                for (name, value) in [("--zero", zero), ("--dup", dup), ("--copies", copies)] {
                    words.extend([name.to_owned(), value.to_string()]);
                }
                let dups = pages * dup / 100;
                let groups = HashMap::from([(copies, dups / copies)]);
                let mut content = Self { pages, zero: pages * zero / 100, groups, image: Vec::new(), words };
                *content.groups.entry(dups % copies).or_default() += 1;
                Ok(content)
            }
            Mix::Image { copies } => {
                let path = super::super::executable()?;
                let mut image =
                    std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
                image.resize(image.len().next_multiple_of(PAGE_SIZE as usize), 0);
                image.truncate((pages / copies * PAGE_SIZE) as usize);
                if image.is_empty() {
                    bail!("{pages} pages are too few for {copies} copies of anything");
                }
                Ok(Self::of_image(image, pages, words))
            }
        }
    }

    fn of_image(image: Vec<u8>, pages: u64, words: Vec<String>) -> Self {
        let different = image.chunks_exact(PAGE_SIZE as usize);
        let count = different.len() as u64;
        let mut sites: HashMap<&[u8], u64> = HashMap::new();
        for (at, page) in (0..).zip(different) {
            *sites.entry(page).or_default() += (pages - at).div_ceil(count);
        }
        let (mut zero, mut groups) = (0, HashMap::new());
        for (page, sites) in sites {
            match page.iter().all(|byte| *byte == 0) {
                true => zero = sites,
                false => *groups.entry(sites).or_default() += 1,
            }
        }
        Self { pages, zero, groups, image, words }
    }

    /// Pages that can be saved where zero pages need no memory, and up to `limit` equal ones share a page.
    pub(super) fn savable(&self, limit: u64) -> u64 {
        self.zero + self.groups.iter().map(|(size, count)| count * sharing(*size, limit)).sum::<u64>()
    }
}

/// What the kernel calls pages_sharing, for `pages` equal ones of which up to `limit` (at least 2) share one: a last one alone
/// is not shared.
pub(super) fn sharing(pages: u64, limit: u64) -> u64 {
    pages / limit * (limit - 1) + (pages % limit).saturating_sub(1)
}

/// And pages_shared: the frames that they have then.
pub(super) fn shared(pages: u64, limit: u64) -> u64 {
    pages / limit + u64::from(pages % limit > 1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn a_mix_is_a_word_or_shares_that_add_up_to_100() {
        let shares = Shares { zero: 25, dup: 50, unique: 25, copies: 8 };
        let parse = |text| Mix::parse(text).map(|mix| mix.with_copies(8));
        assert_eq!(parse("zero=25,dup=50,unique=25"), Ok(Mix::Shares(shares)));
        assert_eq!(parse("unique=25,zero=25,dup=50"), Ok(Mix::Shares(shares)));
        assert_eq!(Mix::parse("zero=25,dup=50,unique=25"), Ok(Mix::Shares(Shares::default())));
        assert_eq!(parse("zero=100"), Ok(Mix::Shares(Shares { zero: 100, dup: 0, unique: 0, copies: 8 })));
        assert_eq!(parse("rewrite"), Ok(Mix::Rewrite(shares)));
        assert_eq!(parse("image"), Ok(Mix::Image { copies: 8 }));
        for (bad, says) in [
            ("zero=25,dup=50", "adds up to 75"),
            ("zero=50,dup=50,unique=25", "adds up to 125"),
            ("zero=50,zero=50", "twice"),
            ("zero=x,dup=100", "whole number"),
            ("zero=-1,dup=100", "whole number"),
            ("zero=101", "whole number"),
            ("zeros=100", "no mix"),
            ("images", "no mix"),
            ("", "no mix"),
        ] {
            let why = Mix::parse(bad).unwrap_err();
            assert!(why.contains(says) && why.lines().count() == 1, "{bad}: {why}");
        }
    }

    #[test]
    fn sharing_follows_the_kernels_formula() {
        for limit in 2..9_u64 {
            for pages in 0..40_u64 {
                let (shared_by_n, sharing_by_n) = match pages % limit {
                    0 | 1 => (pages / limit, pages / limit * (limit - 1)),
                    _ => (pages / limit + 1, pages - (pages / limit + 1)),
                };
                assert_eq!(shared(pages, limit), shared_by_n, "{pages} pages, at most {limit}");
                assert_eq!(sharing(pages, limit), sharing_by_n, "{pages} pages, at most {limit}");
            }
        }
    }

    #[test]
    fn what_can_be_saved_is_counted() {
        let savable = |text: &str, pages, limit| {
            Content::new(&Mix::parse(text).unwrap(), pages, 1).unwrap().savable(limit)
        };
        // 100 zero pages, 50 groups of four.
        assert_eq!(savable("zero=25,dup=50,unique=25", 400, 256), 100 + 50 * 3);
        assert_eq!(savable("zero=25,dup=50,unique=25", 400, 2), 100 + 50 * 2);
        // 7 pages: a group of four and one of three; 5 of 10: a group and one that is alone.
        assert_eq!(savable("dup=70,unique=30", 10, 256), 3 + 2);
        assert_eq!(savable("dup=50,unique=50", 10, 256), 3);
        assert_eq!(savable("unique=100", 1000, 256), 0);
    }

    #[test]
    fn an_image_is_counted_page_by_page() {
        let page = |byte: u8| vec![byte; PAGE_SIZE as usize];
        let image: Vec<u8> = [page(1), page(0), page(1), page(2)].concat();
        // 10 pages: 1 0 1 2, 1 0 1 2, 1 0.
        let content = Content::of_image(image, 10, Vec::new());
        assert_eq!((content.zero, content.savable(256)), (3, 3 + 4 + 1));
        let content = Content::new(&Mix::Image { copies: 4 }, 64, 1).unwrap();
        assert!(content.image.len() as u64 <= 16 * PAGE_SIZE && content.savable(256) >= 48);
        assert!(Content::new(&Mix::Image { copies: 4 }, 3, 1).is_err());
    }
}
