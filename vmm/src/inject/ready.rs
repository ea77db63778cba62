// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The plans that umbra brings along. Each is a file of `vmm/plans`, whose comment at the top is its page.

/// A plan that is there by name.
#[derive(Debug, Clone, Copy)]
pub struct ReadyPlan {
    /// What `umbra inject` finds it by.
    pub name: &'static str,
    /// The whole file.
    pub text: &'static str,
}

macro_rules! plans {
    ($($name:literal),* $(,)?) => {
        &[$(ReadyPlan { name: $name, text: include_str!(concat!("../../plans/", $name, ".toml")) }),*]
    };
}

const PLANS: &[ReadyPlan] = plans![
    "oom-at-5th",
    "oom-random",
    "sigbus-page",
    "poisoned-page",
    "poisoned-later",
    "revoked-page",
    "slow-memory",
    "bit-flip",
    "memory-pressure",
    "interrupted-calls",
    "failing-read",
    "slow-disk",
    "thread-limit",
    "busy-host",
];

impl ReadyPlan {
    /// The first line of its page, behind the licence: what it does.
    pub fn summary(&self) -> &'static str {
        self.text.lines().nth(1).unwrap_or_default().trim_start_matches('#').trim()
    }
}

/// Every one.
pub fn all() -> impl Iterator<Item = &'static ReadyPlan> {
    PLANS.iter()
}

/// The one of this name.
pub fn find(name: &str) -> Option<&'static ReadyPlan> {
    PLANS.iter().find(|plan| plan.name == name)
}

#[cfg(test)]
mod tests {
    use super::super::Plan;
    use super::*;

    #[test]
    fn every_ready_plan_can_be_followed_and_says_what_it_models() {
        for plan in all() {
            plan.text.parse::<Plan>().unwrap_or_else(|error| panic!("{}: {error}", plan.name));
            let page = plan.text.lines().take_while(|line| line.starts_with('#')).count();
            assert!(page >= 4, "{} has no page", plan.name);
            assert!(
                plan.summary().ends_with('.') && plan.summary().len() > 20,
                "{}: {}",
                plan.name,
                plan.summary()
            );
        }
    }
}
