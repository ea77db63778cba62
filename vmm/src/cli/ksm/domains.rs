// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--ksm-domain NAME[=GUESTS]`: which guests share with each other.
//!
//! Without the option all guests do. With it, those of one name; a name without guests takes all that no other has. A guest that
//! is in no domain shares pages with itself alone: whoever separates guests must not forget one by a slip.

use shadow_mmu::ksm::Domain;

/// The most letters of a name.
const LONGEST: usize = 32;

/// One `--ksm-domain`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli) struct DomainArg {
    name: String,
    /// Guests from first to last; `None`: those that are in no other domain.
    guests: Option<Vec<(usize, usize)>>,
}

/// `NAME`, `NAME=0-3`, `NAME=0,2,5`.
pub(super) fn domain(text: &str) -> Result<DomainArg, String> {
    let (name, guests) = match text.split_once('=') {
        Some((name, guests)) => (name, Some(guests)),
        None => (text, None),
    };
    let is_good = |letter: char| letter.is_ascii_alphanumeric() || letter == '-' || letter == '_';
    if name.is_empty() || name.len() > LONGEST || !name.chars().all(is_good) {
        return Err(format!(
            "`{name}` is no name of a domain: up to {LONGEST} letters (a-z, A-Z), digits, - and _"
        ));
    }
    let range = |word: &str| {
        let bad = || format!("`{word}` are no guests: write numbers, as in {name}=0-3 or {name}=0,2,5");
        let number = |text: &str| text.parse::<usize>().map_err(|_| bad());
        let (first, last) = word.split_once('-').unwrap_or((word, word));
        let (first, last) = (number(first)?, number(last)?);
        if first > last { Err(bad()) } else { Ok((first, last)) }
    };
    let guests = guests.map(|guests| guests.split(',').map(range).collect::<Result<_, _>>()).transpose()?;
    Ok(DomainArg { name: name.to_owned(), guests })
}

/// In which domain each guest is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli) struct Domains {
    /// Those that have a name.
    names: Vec<String>,
    /// By guest: which of them.
    of: Vec<Option<usize>>,
    /// Whether nobody named one.
    is_one: bool,
}

impl Domains {
    /// Those of `count` guests.
    ///
    /// # Errors
    /// What is wrong, in one line.
    pub(super) fn new(args: &[DomainArg], count: usize) -> Result<Self, String> {
        let mut domains = Self { names: Vec::new(), of: vec![None; count], is_one: args.is_empty() };
        for DomainArg { name, guests } in args {
            let domain = domains.named(name);
            let all = guests.iter().flatten();
            for guest in all.flat_map(|&(first, last)| first..=last.min(count.max(first))) {
                let Some(of) = domains.of.get_mut(guest) else {
                    return Err(format!(
                        "--ksm-domain {name}: there is no guest {guest}, the last one is {}; --guests says how many there are",
                        count - 1
                    ));
                };
                if let Some(other) = of.replace(domain).filter(|other| *other != domain) {
                    let other = &domains.names[other];
                    return Err(format!(
                        "guest {guest} is in two domains, {other} and {name}: it can share with one"
                    ));
                }
            }
        }
        let mut rest = args.iter().filter(|arg| arg.guests.is_none()).map(|arg| &arg.name);
        if let Some(name) = rest.next() {
            if let Some(other) = rest.find(|other| *other != name) {
                return Err(format!(
                    "{name} and {other} both take the guests that no other domain has: give one of them a list"
                ));
            }
            if domains.of.iter().all(Option::is_some) {
                return Err(format!(
                    "--ksm-domain {name} takes the guests that no other domain has, and there is none: leave it out"
                ));
            }
            let domain = domains.named(name);
            domains.of.iter_mut().for_each(|of| *of = of.or(Some(domain)));
        }
        Ok(domains)
    }

    /// What is probably a slip, in one line: domains in which there is nobody to share with.
    pub(super) fn warning(&self) -> Option<String> {
        let of = |domain| self.of.iter().filter(|of| **of == Some(domain)).count();
        let alone = (0..).zip(&self.names).filter(|(domain, _)| of(*domain) == 1);
        let alone: Vec<_> = alone.map(|(_, name)| name.as_str()).collect();
        // Whoever runs one guest alone knows.
        (self.of.len() > 1 && !alone.is_empty()).then(|| {
            format!("--ksm-domain {}: one guest alone shares pages with nobody but itself", alone.join(", "))
        })
    }

    fn named(&mut self, name: &str) -> usize {
        self.names.iter().position(|known| known == name).unwrap_or_else(|| {
            self.names.push(name.to_owned());
            self.names.len() - 1
        })
    }

    /// The domain of a guest.
    pub(super) fn of(&self, guest: usize) -> Domain {
        match self.of.get(guest).copied().flatten() {
            Some(named) => Domain(named as u32),
            None if self.is_one => Domain(0),
            // Behind all that have a name: its own.
            None => Domain((self.names.len() + guest) as u32),
        }
    }

    /// Its name, where it has one.
    pub(super) fn name(&self, guest: usize) -> Option<&str> {
        self.of.get(guest).copied().flatten().and_then(|named| self.names.get(named)).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;

    fn domains(args: &[&str], count: usize) -> Result<Domains, String> {
        let args: Vec<_> = args.iter().map(|arg| domain(arg).unwrap()).collect();
        Domains::new(&args, count)
    }

    /// Guests that share, by the least of them.
    fn groups(args: &[&str], count: usize) -> Vec<usize> {
        let domains = domains(args, count).unwrap();
        (0..count)
            .map(|guest| (0..=guest).find(|&other| domains.of(other) == domains.of(guest)).unwrap())
            .collect()
    }

    #[test]
    fn guests_of_one_domain_share_and_one_that_is_in_none_is_alone() {
        assert_eq!(groups(&[], 3), [0, 0, 0]);
        assert_eq!(groups(&["a=0-1", "b=2,3"], 4), [0, 0, 2, 2]);
        assert_eq!(groups(&["a=0,2"], 4), [0, 1, 0, 3], "1 and 3 were not named");
        assert_eq!(groups(&["a=1", "rest"], 4), [0, 1, 0, 0]);
        assert_eq!(groups(&["a=0", "b=1", "a=2"], 4), [0, 1, 0, 3]);
        assert_eq!(groups(&["a"], 2), [0, 0]);
        let named = domains(&["a=1", "rest"], 2).unwrap();
        assert_eq!((named.name(0), named.name(1), named.name(2)), (Some("rest"), Some("a"), None));
    }

    #[test]
    fn a_domain_of_one_guest_is_warned_of() {
        let warning = |args: &[&str], count| domains(args, count).unwrap().warning();
        assert_eq!([warning(&[], 3), warning(&["a=0-1", "b"], 4), warning(&["a"], 1)], [None, None, None]);
        let said = warning(&["a=0", "b=1-2", "rest"], 4).unwrap();
        assert!(said.starts_with("--ksm-domain a, rest: one guest") && !said.contains('\n'), "{said}");
    }

    #[test]
    fn what_makes_no_sense_is_said_in_one_line() {
        for bad in
            ["", "=0", "a b=0", "a/b", "ü", "a=", "a=x", "a=3-1", "a=0-", "a=0,,1", "a=-1", &"x".repeat(33)]
        {
            assert!(domain(bad).is_err_and(|said| !said.contains('\n')), "{bad}");
        }
        for (args, words) in [
            (&["a=4"][..], &["no guest 4", "last one is 3"][..]),
            (&["a=2-18446744073709551615"], &["no guest 4"]),
            (&["a=0-2", "b=2"], &["guest 2", "a and b"]),
            (&["a", "b"], &["a and b"]),
            (&["a=0-1", "rest", "b=2-3"], &["rest", "there is none"]),
        ] {
            let said = domains(args, 4).unwrap_err();
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
        }
    }
}
