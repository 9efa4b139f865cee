//! The identifiers that cross crate boundaries, as newtypes so that one cannot be taken for another.

use std::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl $name {
            /// The number itself.
            #[must_use]
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    };
}

number! {
    /// A member of a cluster. Never 0.
    NodeId(u64)
}
number! {
    /// A leader's period of office (Raft, section 5.1). 0 means that there has been none.
    Term(u64)
}
number! {
    /// The position of a command in the replicated log, from 1. 0 is the position before the first.
    LogIndex(u64)
}
number! {
    /// One of several logs that may share a data directory. The first version uses group 0 only.
    GroupId(u32)
}

impl LogIndex {
    /// The position after this one. Saturates at the end of the range, which no log reaches.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The position before this one; 0 stays 0.
    #[must_use]
    pub const fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl Term {
    /// The term after this one. Saturates at the end of the range, which no cluster reaches.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

identity! {
    /// The cluster that a data directory or a connection belongs to.
    ClusterId
}
identity! {
    /// One life of a data directory: random, written when the directory is formatted. A wiped disk that
    /// returns under its old node id has another incarnation, so its votes and acknowledgements do not count.
    Incarnation
}
